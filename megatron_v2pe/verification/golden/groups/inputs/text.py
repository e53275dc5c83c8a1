"""Golden text: ids and decoded strings of the tokenizer, tokens and labels of whole conversations.

Labels are checked twice: by the release's rule in every case, and by the rule that training uses wherever the
release did not drop the sample's supervision over its own bookkeeping. Where a case also records what the reference
meant to do (`intended_...`), that is what is compared: its GPT-OSS code picks end tokens by accident.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.data.samples.encode import EncodedText, TextSettings, encode_conversation
from megatron_v2pe.data.text.masking import LabelRule, Span
from megatron_v2pe.data.text.templates import ChatTemplate, Role, Turn, get_template
from megatron_v2pe.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_v2pe.v2pe.layout import Int64Array
from megatron_v2pe.verification.golden.groups.inputs.prompts import processor_rows, template_rows
from megatron_v2pe.verification.golden.rows import Row, equal, unsupported

_ROLES: dict[str, Role] = {
    **{"human": "human", "gpt": "gpt", "system": "system", "pretrain": "pretrain"},
    "function": "tool",
}


@dataclass(frozen=True)
class Unsupported:
    """Why a checkpoint or a template cannot be run."""

    reason: str


class GoldenTokenizers:
    """Tokenizers of a golden folder, read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "ckpt"
        self._known: dict[str, Tokenizer | Unsupported] = {}

    def tokenizer(self, key: str) -> Tokenizer | Unsupported:
        """Tokenizer of a checkpoint, or why there is none."""
        if key not in self._known:
            try:
                self._known[key] = load_tokenizer(self._folder / key)
            except CheckpointError as error:
                self._known[key] = Unsupported(str(error).split(": ", 1)[-1])
        return self._known[key]

    def text(self, case: dict[str, Any]) -> tuple[Tokenizer, ChatTemplate] | Unsupported:
        """Tokenizer and template of a case, or why it cannot be run."""
        tokenizer = self.tokenizer(case["ckpt"])
        if isinstance(tokenizer, Unsupported):
            return tokenizer
        try:
            return tokenizer, get_template(case["template"])
        except ConfigError:
            return Unsupported(f"template {case['template']!r} is not supported")


def is_of_family(case: dict[str, Any], family: str | None) -> bool:
    """Whether a case's checkpoint key starts with the family asked for."""
    return family is None or str(case["ckpt"]).startswith(family)


def label_spans(labels: Int64Array) -> list[list[int]]:
    """Half-open supervised ranges of labels."""
    supervised = np.concatenate([[0], labels != IGNORE_INDEX, [0]]).astype(np.int64)
    edges = np.flatnonzero(np.diff(supervised)).tolist()
    return [list(span) for span in zip(edges[::2], edges[1::2], strict=True)]


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of the files of text/ but dataset_items.json."""
    templates, processor = folder / "text" / "templates.json", folder / "text" / "hf_processor.json"
    if templates.is_file() and family is None:  # of no family
        yield from template_rows(templates)
    if processor.is_file():
        yield from processor_rows(processor, folder / "ckpt_hf", family=family)
    tokenizers = GoldenTokenizers(folder)
    tokenizer, conversations = folder / "text" / "tokenizer.json", folder / "text" / "conversations.json"
    if tokenizer.is_file():
        cases = json.loads(tokenizer.read_text(encoding="utf-8"))["cases"]
        for number, case in enumerate(cases):
            if is_of_family(case, family):
                yield from _tokenizer_rows(f"text/tokenizer_{case['ckpt']}_{number}", case, tokenizers)
    if conversations.is_file():
        table = json.loads(conversations.read_text(encoding="utf-8"))
        records = {record["id"]: record for record in table["records"]}
        for case in table["cases"]:
            if is_of_family(case, family):
                yield from _conversation_rows(case, records[case["record"]], tokenizers)


def _tokenizer_rows(name: str, case: dict[str, Any], tokenizers: GoldenTokenizers) -> Iterator[Row]:
    tokenizer = tokenizers.tokenizer(case["ckpt"])
    if isinstance(tokenizer, Unsupported):
        yield unsupported(name, "tokenizer", reason=tokenizer.reason)
        return
    ours: dict[str, Any] = {}
    if "text" in case:
        ours["ids_with_special"] = tokenizer.encode(case["text"])
        ours["ids_without_special"] = tokenizer.encode(case["text"], add_bos=False)
        ours["tokens"] = tokenizer.tokenize(case["text"])
    ids = case["ids_with_special"] if "text" in case else case["decode_ids"]
    ours["decoded"] = tokenizer.decode(ids)
    ours["decoded_skip_special"] = tokenizer.decode(ids, skip_special_tokens=True)
    for quantity, value in ours.items():
        wanted = case[quantity]
        yield equal(name, quantity, is_equal=value == wanted, detail=f"{value!r}, expected {wanted!r}")


def _conversation_rows(
    case: dict[str, Any], record: dict[str, Any], tokenizers: GoldenTokenizers
) -> Iterator[Row]:
    suffix = "_padded" if case["pad_to_max_length"] else ""
    name = f"text/{case['ckpt']}_{case['record']}{suffix}"
    text = tokenizers.text(case)
    if isinstance(text, Unsupported):
        yield unsupported(name, "tokens", reason=text.reason)
        return
    roles = {message["from"] for message in record["conv"]}
    if others := sorted(roles - set(_ROLES)):
        yield unsupported(
            name, "tokens", reason=f"messages from {', '.join(others)} are not training data here"
        )
        return
    turns = [Turn(role=_ROLES[message["from"]], value=message["value"]) for message in record["conv"]]
    turns = turns[1:] if turns[0].role == "gpt" else turns  # as parse_record does
    if any(turn.role == "tool" for turn in turns) and not text[1].tool_role:
        yield unsupported(name, "tokens", reason=f"template {case['template']!r} has no role for functions")
        return
    wanted = _Wanted.of(case)
    ours = _encode(turns, case, text, "release")
    pad_id = text[0].pad_id
    num_padding = case["max_length"] - len(ours.tokens) if case["pad_to_max_length"] else 0
    tokens = np.append(ours.tokens, np.full(num_padding, pad_id, dtype=np.int64))
    yield equal(name, "tokens", is_equal=tokens.tolist() == wanted.tokens, detail="token ids differ")
    padding = np.flatnonzero(tokens == pad_id).tolist()
    if wanted.padding is not None:
        detail = f"{padding}, expected {wanted.padding}"
        yield equal(name, "padding", is_equal=padding == wanted.padding, detail=detail)
    yield _label_row(name, "labels_release_rule", ours, wanted.label_spans)
    is_warned = ours.lengths_disagree == case["length_mismatch_warning"]
    yield equal(name, "length_mismatch", is_equal=is_warned, detail=f"{ours.lengths_disagree}")
    if not case["length_mismatch_warning"]:
        yield _label_row(name, "labels", _encode(turns, case, text, "exact"), wanted.label_spans)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a case records; `padding` is None where the reference has no attention mask to compare with."""

    tokens: list[int]
    label_spans: list[Span]
    padding: list[int] | None

    @classmethod
    def of(cls, case: dict[str, Any]) -> _Wanted:
        """What the reference meant where the case has it, else what it does."""
        prefix = "intended_" if "intended_input_ids" in case else ""
        return cls(
            tokens=case[f"{prefix}input_ids"],
            label_spans=case[f"{prefix}label_spans"],
            padding=case["attention_mask_zero_positions"],
        )


def _label_row(name: str, quantity: str, ours: EncodedText, wanted: list[Span]) -> Row:
    spans = label_spans(ours.labels)
    return equal(name, quantity, is_equal=spans == wanted, detail=f"{spans}, expected {wanted}")


def _encode(
    turns: list[Turn], case: dict[str, Any], text: tuple[Tokenizer, ChatTemplate], rule: LabelRule
) -> EncodedText:
    settings = TextSettings(
        tokenizer=text[0],
        template=text[1],
        tokens_per_tile=case["num_image_token"],
        max_tokens=case["max_length"],
        label_rule=rule,
        control_tokens="token",
    )
    return encode_conversation(turns, num_tiles=case["num_tiles"], settings=settings)
