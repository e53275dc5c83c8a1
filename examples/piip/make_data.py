"""Large pictures with one small handwritten digit: what resolution is needed for.

    black picture of 32 x 32 pixels, a digit of 8 x 8 at one of 16 places     "Which digit is shown?" -> "7"

Where the picture is seen at 8 x 8 pixels, the digit has 2 x 2. Digits are scikit-learn's, whose own size is 8 x 8;
training and evaluation share none of them.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatron_v2pe.core.files import write_atomic

QUESTION = "Which digit is shown?"
PIXELS, DIGIT = 32, 8
HELD_OUT_EVERY = 6


def picture(digit: np.ndarray, place: int) -> bytes:
    """A PNG file: `digit` uint8 [8, 8] at place 0..15, counted row by row."""
    grey = np.zeros((PIXELS, PIXELS), dtype=np.uint8)
    row, column = (DIGIT * step for step in divmod(place, PIXELS // DIGIT))
    grey[row : row + DIGIT, column : column + DIGIT] = digit
    content = io.BytesIO()
    Image.fromarray(grey).save(content, format="PNG")
    return content.getvalue()


def write_split(folder: Path, split: str, *, count: int, seed: int) -> None:
    """`count` pictures and their jsonl; `split` is train or eval."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    is_held_out = np.arange(len(images)) % HELD_OUT_EVERY == 0
    pool = np.flatnonzero(is_held_out == (split == "eval"))
    generator = np.random.default_rng([seed, split == "eval"])
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(count):
        index, place = int(generator.choice(pool)), int(generator.integers((PIXELS // DIGIT) ** 2))
        name = f"{split}/{number:05d}.png"
        (folder / name).write_bytes(picture(images[index], place))
        record: dict[str, Any] = {
            "id": f"{split}-{number:05d}",
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": str(digits.target[index])},
            ],
        }
        lines.append(json.dumps(record))
    write_atomic(folder / f"{split}.jsonl", "\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default 0)")
    parser.add_argument("--train", type=int, default=8000, help="training pictures (default 8000)")
    parser.add_argument("--eval", type=int, default=300, help="evaluation pictures (default 300)")
    arguments = parser.parse_args()
    folder = arguments.folder
    write_split(folder, "train", count=arguments.train, seed=arguments.seed)
    write_split(folder, "eval", count=arguments.eval, seed=arguments.seed)
    meta = {
        "annotation": str(folder / "train.jsonl"),
        "root": str(folder),
        "data_augment": False,
        "repeat_time": 1,
        "length": arguments.train,
    }
    # Written last: its presence says that the data is complete.
    write_atomic(folder / "train_meta.json", json.dumps({"digits": meta}, indent=2) + "\n")


if __name__ == "__main__":
    main()
