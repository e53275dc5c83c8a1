"""Long interleaved documents with one marked digit: retrieval data at laptop size, from real input.

    prose words      w w w w w w w w w w w w w w w w w w w w w w
    sheets              [3]     [8]   needle[5]   [0]      [5]         "Which digit is marked?" -> "5"

Text is Python's own language reference (`prose.py`), images are sheets of handwritten digits (`sheets.py`), one
tile of 64 visual tokens each. Every image but one is a distractor; the fixed word MARK precedes the one that is
asked for. Training and evaluation share neither a sheet nor a topic of prose. A sample's length is exact in tokens,
chat template, answer and end token included, and each record is encoded once more after it was built to prove it.

Training documents have any number of images that fits, and prose for the rest, so that all positions up to the
trained length occur whatever strides their images draw. Evaluation documents have as many images as fit, with two
tokens of prose for each: 68 tokens that take 5 positions at the smallest stride.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prose import MARK, Split, prose_words
from sheets import SHEETS_PER_DIGIT, sheet_file, write_sheets

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.data.text.templates import Turn, get_template, render
from megatron_v2pe.data.text.tokenizer import Tokenizer, load_tokenizer

QUESTION = "Which digit is marked?"
TRAIN_LENGTHS = (104, 176, 256, 512)
TRAIN_PROSE, EVAL_PROSE = 1, 2
"""Least tokens of prose for each image."""
EVAL_RECORDS_PER_CELL = {512: 4, 1024: 4, 2048: 4, 4096: 8, 8192: 3}
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Material of one split.

    Attributes:
        split: whose sheets are shown.
        words: prose in reading order.
        ends: int64 [len(words)+1], tokens of all words before each place, each word with its blank.
    """

    split: Split
    words: list[str]
    ends: NDArray[np.int64]


class DocumentWriter:
    """Builds records of an exact length.

    Args:
        tokenizer: the checkpoint's; lengths are counted in its tokens.
        template: name of the chat template.
        tokens_per_tile: visual tokens of an image.
        source: prose and digits of the split.
    """

    def __init__(self, tokenizer: Tokenizer, *, template: str, tokens_per_tile: int, source: Source) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._template = get_template(template)
        self._tokens_per_image = tokens_per_tile + 2
        self._visual = "<img>" + "<IMG_CONTEXT>" * tokens_per_tile + "</img>"
        self._fixed_tokens = self.count("\n" + QUESTION)
        self._mark_tokens = len(tokenizer.encode(" " + MARK, add_bos=False))

    def count(self, message: str) -> int:
        """Tokens of the whole sample in which the user says `message` and the answer is one digit."""
        turns = [Turn(role="human", value=message), Turn(role="gpt", value="0")]
        text = render(self._template, turns).text.replace("<image>", self._visual)
        return len(self._tokenizer.encode(text))

    def most_images(self, length: int, *, prose: int) -> int:
        """Images that fit into a document of `length` tokens with `prose` tokens of prose for each."""
        return (length - self._fixed_tokens - self._mark_tokens) // (self._tokens_per_image + prose)

    def record(
        self, generator: np.random.Generator, *, length: int, depth: float, num_images: int, name: str
    ) -> dict[str, Any]:
        """One record in the release's format, with `length`, `depth` and `answer` beside it.

        Args:
            generator: source of every choice.
            length: tokens of the sample, exact.
            depth: 0..1, where among the images the needle is.
            num_images: images of the document, the needle among them; the rest is prose.
            name: id of the record.
        """
        body_tokens = length - self._fixed_tokens
        text_tokens = body_tokens - self._mark_tokens - num_images * self._tokens_per_image
        words = self._passage(generator, text_tokens)
        needle = min(int(depth * num_images), num_images - 1)
        # One image in each of num_images equal stretches of the text, anywhere inside its stretch.
        places = (len(words) * (np.arange(num_images) + generator.random(num_images)) / num_images).astype(
            int
        )
        digits = generator.integers(10, size=num_images).tolist()
        sheets = generator.integers(SHEETS_PER_DIGIT, size=num_images).tolist()
        message = _interleave(words, places.tolist(), needle) + "\n" + QUESTION
        if self.count(message) != length:
            raise AssertionError(f"{name}: {self.count(message)} tokens instead of {length}")
        answer = str(digits[needle])
        return {
            "id": name,
            "image": [sheet_file(self._source.split, *each) for each in zip(digits, sheets, strict=True)],
            "conversations": [{"from": "human", "value": message}, {"from": "gpt", "value": answer}],
            "length": length,
            "depth": depth,
            "answer": answer,
        }

    def _passage(self, generator: np.random.Generator, tokens: int) -> list[str]:
        """Consecutive words of the prose that have exactly that many tokens."""
        ends, words = self._source.ends, self._source.words
        for _ in range(10_000):
            first = int(generator.integers(len(words)))
            # The document's first word has no blank before it, because messages are stripped.
            bare = len(self._tokenizer.encode(words[first], add_bos=False))
            want = int(ends[first + 1]) + tokens - bare
            last = int(np.searchsorted(ends, want))
            if first < last < len(ends) and ends[last] == want:
                return words[first:last]
        raise ValueError(f"no passage of {tokens} tokens in {int(ends[-1])} tokens of prose")


def _interleave(words: Sequence[str], places: Sequence[int], needle: int) -> str:
    """Words with an `<image>` before each of `places`, and the mark before the needle's.

    Places must be at least 1, so that the document starts with prose.
    """
    parts: list[str] = []
    image = 0
    for index, word in enumerate([*words, ""]):
        while image < len(places) and max(places[image], 1) == index:
            parts.append((" " + MARK if image == needle else "") + "<image>")
            image += 1
        if word:
            parts.append((" " if index else "") + word)
    return "".join(parts)


def load_source(split: Split, tokenizer: Tokenizer) -> Source:
    """Prose and digits of one split."""
    words = prose_words(split)
    lengths = {word: len(tokenizer.encode(" " + word, add_bos=False)) for word in set(words)}
    return Source(
        split=split,
        words=words,
        ends=np.concatenate([[0], np.cumsum([lengths[word] for word in words])]).astype(np.int64),
    )


def train_records(writer: DocumentWriter, *, tokens_per_length: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records of every training length, about as many tokens of each; needles at any depth."""
    for length in TRAIN_LENGTHS:
        generator = np.random.default_rng([seed, 0, length])
        for number in range(max(1, tokens_per_length // length)):
            depth = round(float(generator.random()), 3)
            most = writer.most_images(length, prose=TRAIN_PROSE)
            num_images = int(generator.integers(min(2, most), most + 1))
            name = f"train-{length}-{number:05d}"
            yield writer.record(generator, length=length, depth=depth, num_images=num_images, name=name)


def eval_records(writer: DocumentWriter, *, share: float, seed: int) -> Iterator[dict[str, Any]]:
    """Records on a full grid of length and depth; `share` of the usual number, at least one a cell."""
    for length, usual in EVAL_RECORDS_PER_CELL.items():
        generator = np.random.default_rng([seed, 1, length])
        for depth in DEPTHS:
            for number in range(max(1, round(usual * share))):
                name = f"eval-{length}-{depth}-{number:03d}"
                num_images = writer.most_images(length, prose=EVAL_PROSE)
                yield writer.record(generator, length=length, depth=depth, num_images=num_images, name=name)


def write_data(
    folder: Path, checkpoint: Path, *, seed: int, tokens_per_length: int, eval_share: float
) -> dict[str, int]:
    """Write images, `train.jsonl` with its meta json, and `eval.jsonl`; returns records of each file."""
    tokenizer, arch = load_tokenizer(checkpoint), read_architecture(checkpoint)
    writers = {
        split: DocumentWriter(
            tokenizer,
            template=arch.template,
            tokens_per_tile=arch.tokens_per_tile,
            source=load_source(split, tokenizer),
        )
        for split in ("train", "held_out")
    }
    write_sheets(folder, seed=seed)
    files = {
        "train": train_records(writers["train"], tokens_per_length=tokens_per_length, seed=seed),
        "eval": eval_records(writers["held_out"], share=eval_share, seed=seed),
    }
    counts = {}
    for name, records in files.items():
        lines = [json.dumps(record) for record in records]
        counts[name] = len(lines)
        write_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    meta = {
        "annotation": str(folder / "train.jsonl"),
        "root": str(folder),
        "data_augment": False,
        "repeat_time": 1,
        "length": counts["train"],
    }
    # Written last: its presence says that the data is complete.
    write_atomic(folder / "train_meta.json", json.dumps({"quickstart": meta}, indent=2) + "\n")
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to fill")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder whose tokenizer counts")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default 0)")
    parser.add_argument("--tokens-per-length", type=int, default=400_000, help="training tokens per length")
    parser.add_argument("--eval-share", type=float, default=1.0, help="share of the evaluation records")
    arguments = parser.parse_args()
    counts = write_data(
        arguments.folder,
        arguments.checkpoint,
        seed=arguments.seed,
        tokens_per_length=arguments.tokens_per_length,
        eval_share=arguments.eval_share,
    )
    print(f"{arguments.folder}: {counts['train']} training and {counts['eval']} evaluation documents")


if __name__ == "__main__":
    main()
