"""A byte-level vocabulary of the size of Qwen2's, made up around the golden checkpoint's few hundred entries.

Memory of a tokenizer is that of its vocabulary, and the real one is not at hand without a download. New entries are
joined from known ones and have a merge each, as in the real files.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

NUM_ENTRIES = 151_643
_MAX_LETTERS = 12


def make_big(source: Path, folder: Path) -> None:
    """Copy a Qwen2 tokenizer with its vocabulary grown to `NUM_ENTRIES`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    known = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    entries, seen = sorted(known, key=known.__getitem__), set(known)
    merges = [line for line in (source / "merges.txt").read_text(encoding="utf-8").split("\n") if line]
    shift, draw = NUM_ENTRIES - len(entries), random.Random(0)
    while len(entries) < NUM_ENTRIES:
        first = entries[draw.randrange(max(0, len(entries) - 20000), len(entries))]
        second = entries[draw.randrange(min(len(entries), 2000))]
        joined = first + second
        if len(joined) <= _MAX_LETTERS and joined not in seen:
            seen.add(joined)
            entries.append(joined)
            merges.append(f"{first} {second}")
    (folder / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _shift_added(folder, shift)


def _shift_added(folder: Path, shift: int) -> None:
    """Added tokens follow the vocabulary."""
    path = folder / "added_tokens.json"
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({token: index + shift for token, index in values.items()}))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("added_tokens_decoder", {})
    config["added_tokens_decoder"] = {str(int(index) + shift): values for index, values in decoder.items()}
    path.write_text(json.dumps(config))
