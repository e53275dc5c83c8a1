"""Does what belongs together fit together: a tokenizer, the rows of an embedding, a chat template, config.json.

Each of the four may come from another hand (a token was added, a template was named after another model), and what does
not fit trains garbage without a word: an id without a row reads a padding row or breaks a kernel, a stop token that is
several tokens is learnt as letters and never ends an answer.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.data.text.templates import TEMPLATES, ChatTemplate, get_template
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, Tokenizer

logger = logging.getLogger(__name__)
_MARKER = re.compile(r"<\|[^|<>]+\|>")
_SHOWN = 3


def require_rows(
    tokenizer: Tokenizer, *, num_rows: int, folder: str | Path, image_token_id: int | None = None
) -> None:
    """Every id that the tokenizer can make has a row of the embedding, and the image tokens are single tokens.

    Args:
        tokenizer: of the folder.
        num_rows: `vocab_size` of config.json, which the embedding has; rows that a run pads with are not counted.
        folder: for messages.
        image_token_id: of a native config.json, which is not used: the tokenizer's is. Another one is warned of.

    Raises:
        CheckpointError: names the tokens without a row.
    """
    beyond = tokenizer.tokens_from(num_rows)
    if beyond:
        named = ", ".join(f"{token!r} = {index}" for token, index in beyond[:_SHOWN])
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but vocab_size of config.json and the "
            f"embedding have {num_rows} rows (ids 0..{num_rows - 1}): {named}"
            f"{', ...' if len(beyond) > _SHOWN else ''}. Resize the embedding first (resize_token_embeddings of "
            "transformers), or remove the added tokens from added_tokens.json and tokenizer_config.json"
        )
    for token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT):
        if not _is_single(tokenizer, token):
            raise CheckpointError(
                f"{folder}: {token!r} is not one token of the tokenizer, and images need {IMAGE_START}, {IMAGE_END} "
                f"and {IMAGE_CONTEXT}; take the tokenizer files of an InternVL checkpoint"
            )
    if image_token_id not in (None, tokenizer.image_token_id):
        logger.warning(
            "%s: image_token_id of config.json is %d, but %s is %d in the tokenizer, which is used here; transformers "
            "would put image features elsewhere. Its converter writes 92546 for every model without Qwen",
            *(folder, image_token_id, IMAGE_CONTEXT, tokenizer.image_token_id),
        )


def chosen_template(
    of_run: str, of_checkpoint: str, *, tokenizer: Tokenizer, folder: str | Path
) -> ChatTemplate:
    """The template of a run or, where it names none, of its checkpoint; it fits the tokenizer.

    Args:
        of_run: `data.template`; empty takes the checkpoint's.
        of_checkpoint: `template` of its config.json.
        tokenizer: of the folder.
        folder: where config.json is.

    Raises:
        ConfigError: the run names a template that is unknown, or does not fit.
        CheckpointError: config.json does.
    """
    if of_run:
        template, source = get_template(of_run), "data.template"
    else:
        source = f"{Path(folder) / 'config.json'}: key 'template'"
        if of_checkpoint not in TEMPLATES:
            state = f"is {of_checkpoint!r}, which is unknown" if of_checkpoint else "is missing or empty"
            raise CheckpointError(
                f"{source} {state}; the templates are {', '.join(TEMPLATES)}. Write the one that the checkpoint was "
                "trained with into config.json, or name it as data.template of a run"
            )
        template = get_template(of_checkpoint)
    foreign = foreign_markers(template, tokenizer)
    if foreign:
        fitting = [name for name, other in TEMPLATES.items() if not foreign_markers(other, tokenizer)]
        error = ConfigError if of_run else CheckpointError
        raise error(
            f"{source} is {template.name!r}, but {', '.join(map(repr, foreign))} "
            f"{'is' if len(foreign) == 1 else 'are'} not single tokens of the tokenizer in {folder}: they would be "
            "learnt as letters, and answers would not end; templates that fit it: "
            f"{', '.join(fitting) or 'none'}"
        )
    return template


def foreign_markers(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Role and stop tokens of a template that are not one token of a tokenizer each."""
    texts = (
        *(template.system, template.user_role, template.tool_role, template.assistant_role),
        *(template.answer_header, template.separator, template.last_separator),
    )
    markers = dict.fromkeys(marker for text in texts for marker in _MARKER.findall(text))
    return [marker for marker in markers if not _is_single(tokenizer, marker)]


def _is_single(tokenizer: Tokenizer, token: str) -> bool:
    try:
        # An added token is cut out of a text before the vocabulary sees it.
        index, is_added = tokenizer.token_id(token), token in tokenizer.added_tokens
        return is_added or tokenizer.encode(token, add_bos=False) == [index]
    except CheckpointError:
        return False
