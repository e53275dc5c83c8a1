r"""Chat templates as data, and the one function that renders them.

    internlm2-chat, Hermes-2:
    <|im_start|>system\n{system}<|im_end|><|im_start|>user\n{Q}<|im_end|><|im_start|>assistant\n{A}<|im_end|>
    phi3-chat:
    <|system|>\n{system}<|end|><|user|>\n{Q}<|end|><|assistant|>\n{A}<|end|>
    internvl3_5_gpt_oss:
    <|start|>system<|message|>{system}<|end|><|start|>user<|message|>{Q}<|end|>
    <|start|>assistant<|channel|>final<|message|>{A}<|end|>, and <|return|> after the last answer

There is no newline after `<|im_end|>`, and an empty message renders its role only, as in the release; `internvl2_5`, of
InternVL 2.5, 3 and 3.5, has the newline, also after empty messages. The release also lists templates of models before
InternVL2 (vicuna_v1.1, internvl_zh, internlm2-base); no checkpoint that this package reads names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_v2pe.core.errors import ConfigError, DataError

Role = Literal["human", "gpt", "system", "tool", "pretrain"]
ReleaseRule = Literal["internlm", "mpt", "phi3", "per_message"]

# "You are the multimodal model InternVL, developed jointly by Shanghai AI Laboratory and SenseTime, ..."
_INTERNVL_SYSTEM = (
    "\u4f60\u662f\u7531\u4e0a\u6d77\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u8054\u5408\u5546\u6c64"
    "\u79d1\u6280\u5f00\u53d1\u7684\u4e66\u751f\u591a\u6a21\u6001\u5927\u6a21\u578b\uff0c\u82f1\u6587"
    "\u540d\u53ebInternVL, \u662f\u4e00\u4e2a\u6709\u7528\u65e0\u5bb3\u7684\u4eba\u5de5\u667a\u80fd"
    "\u52a9\u624b\u3002"
)
# "You are InternVL, a multimodal large language model developed jointly by Shanghai AI Laboratory, Tsinghua ..."
_INTERNVL2_5_SYSTEM = (
    "\u4f60\u662f\u4e66\u751f\u00b7\u4e07\u8c61\uff0c\u82f1\u6587\u540d\u662fInternVL\uff0c\u662f"
    "\u7531\u4e0a\u6d77\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u3001\u6e05\u534e\u5927\u5b66\u53ca"
    "\u591a\u5bb6\u5408\u4f5c\u5355\u4f4d\u8054\u5408\u5f00\u53d1\u7684\u591a\u6a21\u6001\u5927"
    "\u8bed\u8a00\u6a21\u578b\u3002"
)

_GPT_OSS_SYSTEM = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: who says it, `tool` of what a function returned; `pretrain` is a text of its own, without a template, that
            is learned as a whole.
        value: its text.
        supervised: an answer is learned; false masks it (`loss: false` of a message).
    """

    role: Role
    value: str
    supervised: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation becomes one string.

    Attributes:
        system: everything before the first turn, without its separator.
        system_role: written before a system message of the conversation's own, which takes the place of `system`.
        user_role: written before a human message.
        assistant_role: written before an answer; the prompt of a generation ends with it.
        separator: written after the system text and after each message.
        tool_role: written before what a function returned; empty where the template has no such turn.
        answer_header: what an answer begins with after the role. The model says it itself, so it is supervised, and the
            prompt of a generation ends before it; the text of an answer is what comes after it.
        last_separator: in the place of `separator` after an answer that ends a conversation; empty is `separator`.
        strip_values: blanks around each message are dropped.
        keeps_empty: an empty message has its separator too.
        release_rule: which of the release's three ways to count label lengths belongs to it; `per_message` where each
            message is tokenised by itself and nothing is counted.
    """

    name: str
    system: str
    system_role: str = "<|im_start|>system\n"
    user_role: str
    assistant_role: str
    separator: str
    tool_role: str = ""
    answer_header: str = ""
    last_separator: str = ""
    strip_values: bool
    keeps_empty: bool = False
    release_rule: ReleaseRule

    @property
    def system_text(self) -> str:
        """The system text of conversations that have none of their own."""
        return self.system.removeprefix(self.system_role)

    def with_system(self, text: str) -> ChatTemplate:
        """The template with another system text."""
        return replace(self, system=self.system_role + (text.strip() if self.strip_values else text))

    @property
    def stop_token(self) -> str:
        """The token at which an answer ends."""
        return (self.last_separator or self.separator).strip()


_INTERNLM2_CHAT = ChatTemplate(
    name="internlm2-chat",
    system="<|im_start|>system\n" + _INTERNVL_SYSTEM,
    user_role="<|im_start|>user\n",
    assistant_role="<|im_start|>assistant\n",
    separator="<|im_end|>",
    strip_values=True,
    release_rule="internlm",
)

TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        _INTERNLM2_CHAT,
        replace(_INTERNLM2_CHAT, name="Hermes-2", strip_values=False, release_rule="mpt"),
        ChatTemplate(
            name="phi3-chat",
            system_role="<|system|>\n",
            system="<|system|>\n" + _INTERNVL_SYSTEM,
            user_role="<|user|>\n",
            assistant_role="<|assistant|>\n",
            separator="<|end|>",
            strip_values=False,
            release_rule="phi3",
        ),
        replace(
            _INTERNLM2_CHAT,
            name="internvl2_5",
            system="<|im_start|>system\n" + _INTERNVL2_5_SYSTEM,
            separator="<|im_end|>\n",
            strip_values=False,
            keeps_empty=True,
            release_rule="per_message",
        ),
        ChatTemplate(
            name="internvl3_5_gpt_oss",
            system_role="<|start|>system<|message|>",
            system="<|start|>system<|message|>" + _GPT_OSS_SYSTEM,
            user_role="<|start|>user<|message|>",
            tool_role="<|start|>tool<|message|>",
            assistant_role="<|start|>assistant",
            answer_header="<|channel|>final<|message|>",
            separator="<|end|>",
            last_separator="<|return|>",
            strip_values=False,
            keeps_empty=True,
            release_rule="per_message",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """A conversation as one string.

    Attributes:
        text: what is tokenised.
        value_starts: character offset of each turn's value in `text`.
        written: half-open character ranges that the template did not write: system text and messages of a record.
        answers: half-open character ranges that are supervised: each answer with its stop token, or the whole text.
        is_plain: a text without a template.
    """

    text: str
    value_starts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...] = ()
    is_plain: bool = False


def get_template(name: str) -> ChatTemplate:
    """The template of that name.

    Raises:
        ConfigError: no such template.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f"data.template is {name!r}, but the templates are {', '.join(TEMPLATES)}; set data.template, "
            "or leave it empty to use the checkpoint's own"
        )
    return TEMPLATES[name]


def render(
    template: ChatTemplate, turns: Sequence[Turn], *, add_generation_prompt: bool = False
) -> RenderedConversation:
    """Render turns; values are not changed (see `ChatTemplate.strip_values` for who strips them).

    Args:
        template: see `get_template`.
        turns: messages, human and gpt in turn; a system message may come first, and what a function returned before an
            answer. Or a single one of `pretrain`.
        add_generation_prompt: end with the assistant's role, so that the model answers next.

    Raises:
        DataError: a turn of a function, for which the template has no role.
    """
    if turns and turns[0].role == "pretrain":
        whole = ((0, len(turns[0].value)),)
        return RenderedConversation(
            text=turns[0].value, value_starts=(0,), answers=whole, written=whole, is_plain=True
        )
    text, starts = "", []
    if not turns or turns[0].role != "system":
        text = template.system + template.separator
    answers: list[tuple[int, int]] = []
    for turn in turns:
        is_answer = turn.role == "gpt"
        text += _role_text(template, turn.role)
        answer_start = len(text)
        text += template.answer_header if is_answer else ""
        starts.append(len(text))
        ends_all = is_answer and turn is turns[-1] and not add_generation_prompt
        separator = (template.last_separator if ends_all else "") or template.separator
        text += turn.value + separator if turn.value or template.keeps_empty else ""
        if is_answer and turn.supervised:
            num_unsupervised = len(separator) - len(separator.strip())
            answers.append((answer_start, max(answer_start, len(text) - num_unsupervised)))
    text += template.assistant_role if add_generation_prompt else ""
    written = tuple((start, start + len(turn.value)) for start, turn in zip(starts, turns, strict=True))
    return RenderedConversation(
        text=text,
        value_starts=tuple(starts),
        answers=tuple(answers),
        written=(*_own_system(template, text), *written),
    )


def _role_text(template: ChatTemplate, role: Role) -> str:
    if role == "tool" and not template.tool_role:
        raise DataError(
            f"a message is from a function, but template {template.name!r} has no role for it; remove the message, or "
            "write what the function returned into a human one"
        )
    roles = {
        "system": template.system_role,
        "human": template.user_role,
        "gpt": template.assistant_role,
        "tool": template.tool_role,
    }
    return roles[role]


def _own_system(template: ChatTemplate, text: str) -> tuple[tuple[int, int], ...]:
    """Where a system text is that somebody wrote in the place of the template's own."""
    known = TEMPLATES.get(template.name, template)
    if template.system == known.system or not text.startswith(template.system):
        return ()
    return ((len(template.system_role), len(template.system)),)
