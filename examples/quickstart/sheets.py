"""Pictures of the quickstart: sheets of handwriting, each one digit written 64 times.

    scikit-learn's digits (8 x 8 grey levels)  --8 x 8 of one value-->  sheet of 64 x 64 pixels, one tile

One visual token covers one of the small digits, so reading is learnt in minutes, and a sheet has many tokens, so
that the size of their step matters. Training and evaluation sheets are written by different samples of handwriting.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prose import Split
from sklearn.datasets import load_digits

SHEETS_PER_DIGIT = 24
ROWS = 8
"""A sheet has ROWS x ROWS digits of 8 x 8 pixels."""
_HELD_OUT_EVERY = 6


def sheet_file(split: Split, digit: int, number: int) -> str:
    """Path of a sheet under the data folder."""
    return f"sheets/{split}_{digit}_{number:02d}.png"


def write_sheets(folder: Path, *, seed: int) -> None:
    """Write the sheets of both splits as PNG files; documents share them.

    Args:
        folder: data folder.
        seed: decides which samples of handwriting are on which sheet.
    """
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    is_held_out = np.arange(len(grey)) % _HELD_OUT_EVERY == 0
    for split, mine in (("train", ~is_held_out), ("held_out", is_held_out)):
        generator = np.random.default_rng([seed, 2, split == "train"])
        for digit in range(10):
            samples = np.flatnonzero(mine & (digits.target == digit))
            for number in range(SHEETS_PER_DIGIT):
                content = io.BytesIO()
                chosen = generator.choice(samples, ROWS**2)
                Image.fromarray(_sheet(grey[chosen])).save(content, format="PNG")
                # Not flushed one by one: hundreds of flushes cost seconds, and a lost picture is drawn again.
                (folder / sheet_file(split, digit, number)).write_bytes(content.getvalue())


def _sheet(digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [64, 8, 8] -> uint8 [64, 64], row by row."""
    # [row, column, y, x] -> [row, y, column, x]
    return digits.reshape(ROWS, ROWS, 8, 8).transpose(0, 2, 1, 3).reshape(ROWS * 8, ROWS * 8)
