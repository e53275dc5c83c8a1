r"""Chat templates as data, and the one function that renders them.

    internlm2-chat, two turns:
    <|im_start|>system\n{system}<|im_end|><|im_start|>user\n{Q}<|im_end|><|im_start|>assistant\n{A}<|im_end|>

There is no newline after `<|im_end|>`, and an empty message renders its role only, as in the release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.core.errors import ConfigError

Role = Literal["human", "gpt"]

# "You are the multimodal model InternVL, developed jointly by Shanghai AI Laboratory and SenseTime, ..."
_INTERNVL_SYSTEM = (
    "\u4f60\u662f\u7531\u4e0a\u6d77\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u8054\u5408\u5546\u6c64"
    "\u79d1\u6280\u5f00\u53d1\u7684\u4e66\u751f\u591a\u6a21\u6001\u5927\u6a21\u578b\uff0c\u82f1\u6587"
    "\u540d\u53ebInternVL, \u662f\u4e00\u4e2a\u6709\u7528\u65e0\u5bb3\u7684\u4eba\u5de5\u667a\u80fd"
    "\u52a9\u624b\u3002"
)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Role
    value: str


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation becomes one string.

    Attributes:
        system: everything before the first turn, without its separator.
        user_role: written before a human message.
        assistant_role: written before an answer; the prompt of a generation ends with it.
        separator: written after the system text and after each message; the model stops at it.
        strip_values: blanks around each message are dropped.
    """

    name: str
    system: str
    user_role: str
    assistant_role: str
    separator: str
    strip_values: bool


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        ChatTemplate(
            name="internlm2-chat",
            system="<|im_start|>system\n" + _INTERNVL_SYSTEM,
            user_role="<|im_start|>user\n",
            assistant_role="<|im_start|>assistant\n",
            separator="<|im_end|>",
            strip_values=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class RenderedConversation:
    """A conversation as one string.

    Attributes:
        text: what is tokenised.
        value_starts: character offset of each turn's value in `text`.
        answers: half-open character ranges that are supervised: each answer with its separator.
    """

    text: str
    value_starts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


def get_template(name: str) -> ChatTemplate:
    """The template of that name.

    Raises:
        ConfigError: no such template.
    """
    if name not in TEMPLATES:
        raise ConfigError(
            f"data.template is {name!r}, but the templates are {', '.join(TEMPLATES)}; set data.template, "
            "or leave it empty to take the checkpoint's own"
        )
    return TEMPLATES[name]


def render(
    template: ChatTemplate, turns: Sequence[Turn], *, add_generation_prompt: bool = False
) -> RenderedConversation:
    """Render turns; values are taken as they are (see `ChatTemplate.strip_values` for who strips them).

    Args:
        template: see `get_template`.
        turns: messages, human and gpt in turn.
        add_generation_prompt: end with the assistant's role, so that the model answers next.
    """
    text = template.system + template.separator
    starts: list[int] = []
    answers: list[tuple[int, int]] = []
    for turn in turns:
        text += template.assistant_role if turn.role == "gpt" else template.user_role
        starts.append(len(text))
        text += turn.value + template.separator if turn.value else ""
        if turn.role == "gpt":
            answers.append((starts[-1], len(text)))
    text += template.assistant_role if add_generation_prompt else ""
    return RenderedConversation(text=text, value_starts=tuple(starts), answers=tuple(answers))
