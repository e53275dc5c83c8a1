"""What an evaluation is: answers of different checkpoints, strides, settings or data never share a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.evaluation.benchmarks.base import Request

MANIFEST = "benchmark.json"


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """One evaluation; a line of `benchmark.json` each.

    Attributes:
        benchmark: its name.
        checkpoint: folder, for readers; `checkpoint_digest` decides.
        checkpoint_digest: what identifies its bytes, see `checkpoint.model_source`.
        strides: asked for, in order.
        way: `generate` or `forced`.
        sets: which sets; empty is all.
        limit: most questions of a set; 0 is all.
        settings: everything else that an answer depends on, in words.
        annotations: SHA-256 of each annotation file by its path below the data folder.
        num_requests: questions in all.
        trained_length: positions that the checkpoint was trained for.
        tokens_per_tile: visual tokens of one tile, the largest stride.
    """

    benchmark: str
    checkpoint: str
    checkpoint_digest: str
    strides: tuple[str, ...]
    way: str
    sets: tuple[str, ...]
    limit: int
    settings: str
    annotations: dict[str, str]
    num_requests: int
    trained_length: int
    tokens_per_tile: int


_MEANING = {
    "checkpoint_digest": "the checkpoint",
    "strides": "the list of strides",
    "annotations": "an annotation file",
    "way": "--mode",
}


def question_digest(request: Request) -> str:
    """SHA-256 of a question and its settings, without its media."""
    plain = {
        "parts": [
            {k: v for k, v in vars(part).items() if k not in ("path", "data")} for part in request.parts
        ],
        "max_new_tokens": request.max_new_tokens,
        "max_tiles": request.max_tiles,
        "stop": request.stop,
        "forced_answer": request.forced_answer,
        "gold": dict(request.gold),
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).hexdigest()
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def claim_folder(out: Path, identity: RunIdentity, *, is_writer: bool) -> None:
    """Make the folder, or continue in it when it holds the same evaluation.

    Args:
        out: the folder.
        identity: what is evaluated.
        is_writer: one process of several leaves the mark; all of them check it.

    Raises:
        ConfigError: it cannot be made, or holds another evaluation; says which of its parts differs.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {out}: cannot be created ({error.strerror}); choose another folder"
        ) from None
    wanted = json.loads(json.dumps(asdict(identity)))
    if (out / MANIFEST).exists():
        found = read_manifest(out)
        for key, value in wanted.items():
            if key == "checkpoint" or found.get(key) == value:
                continue
            what = _MEANING.get(key, key)
            raise ConfigError(
                f"--out: {out} holds an evaluation in which {what} is not the same "
                f"({_difference(found.get(key), value)}); choose another folder or remove this one"
            )
    if is_writer:
        write_atomic(out / MANIFEST, json.dumps(wanted, indent=2) + "\n")


def read_manifest(out: Path) -> dict[str, Any]:
    """`benchmark.json` of a folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = out / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except OSError:
        raise ConfigError(f"{out}: has no {MANIFEST}, so it is no folder of `evaluate --benchmark`") from None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); evaluate into another folder") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: damaged; evaluate into another folder")
    return dict(values)


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        return f"{names[0]} changed"
    return f"{_short(found)} there, {_short(wanted)} now"


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)[:80]
