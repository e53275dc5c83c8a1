"""A small folder of texts, images and short visual questions, from what is installed anyway.

    pydoc_data.topics  -> texts/*.txt          Python's language reference
    sklearn digits     -> images/*.png         handwritten digits, 56 x 56
                       -> vqa.jsonl            "Which digit is this?"

In place of your own folders: `megatron-v2pe synthesize` reads any.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megatron_v2pe.core.files import write_atomic

NUM_DIGITS = 300
PIXELS_PER_DOT = 7
"""Digits have 8 x 8 dots; 56 pixels are one tile of the model with 4 tokens a tile."""


def write_texts(folder: Path) -> None:
    """One file for each topic."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        write_atomic(folder / f"{name.replace('/', '_')}.txt", text)


def write_digits(folder: Path) -> None:
    """Images, and a question about each; the questions last."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(NUM_DIGITS):
        grey = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
        enlarged = np.kron(grey, np.ones((PIXELS_PER_DOT, PIXELS_PER_DOT), dtype=np.uint8))
        content = io.BytesIO()
        Image.fromarray(enlarged).save(content, format="PNG")
        name = f"{number:04d}.png"
        (folder / "images" / name).write_bytes(content.getvalue())
        asked = {"from": "human", "value": "<image>\nWhich digit is this?"}
        answer = {"from": "gpt", "value": str(digits.target[number])}
        lines.append(json.dumps({"image": name, "conversations": [asked, answer]}))
    write_atomic(folder / "vqa.jsonl", "\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to fill")
    folder = parser.parse_args().folder
    write_texts(folder / "texts")
    write_digits(folder)


if __name__ == "__main__":
    main()
