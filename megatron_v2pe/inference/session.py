"""A document that was answered about, on disk: its keys and values, and what they depend on.

    folder/session.json                     checkpoint, sizes, tokens, images, conversation; written last
    folder/kv_tp0_pp0_cp0.safetensors       rows of one rank, as they are stored; its SHA-256 is in `.sha256`

A session belongs to one checkpoint, one dtype and one storage of keys and values; ranks of another layout pick their
rows from the files (`cache.reshard`). What is loaded is used only as far as a prompt has the same content, so a changed
image or text is computed anew and never answered from old keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_v2pe.checkpoint.model_source import source_digest
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.files import commit_folder, write_atomic
from megatron_v2pe.inference.cache.kv_cache import KVCache
from megatron_v2pe.inference.cache.prefix import Content
from megatron_v2pe.inference.cache.reshard import Layout, Rank, Wanted, resharded
from megatron_v2pe.inference.chunks import Span
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.parallel.replica import agree_on_problem
from megatron_v2pe.v2pe.layout import SampleLayout

SESSION_FILE = "session.json"
FORMAT_VERSION = 2
_READ_BYTES = 2**20
_WAY_OUT = {
    "kv": "start with --kv as it was saved, or ask without it, which computes the document again",
    "dtype": "start with --dtype as it was saved, or ask without it, which computes the document again",
}


def save_session(
    engine: Engine, folder: str | Path, *, checkpoint: str | Path, messages: Sequence[Message]
) -> None:
    """Write the document that was answered about last; every rank of the replica calls it alike.

    Args:
        engine: it keeps documents (`keep_tokens`).
        folder: to be made; must not exist.
        checkpoint: folder of the engine's checkpoint.
        messages: the conversation, answer included.

    Raises:
        ConfigError: nothing was answered yet, or the folder exists or cannot be written; on all ranks alike.
    """
    target, kept = Path(folder), engine.documents.newest
    if kept is None:
        raise ConfigError("there is no document to be saved; ask something first")
    content, cache = kept
    aside = target.with_name(target.name + ".incomplete")
    problem = ""
    if engine.ranks.rank == 0:
        problem = _make_folder(target, aside)
    _raise(agree_on_problem(problem, ranks=engine.ranks))
    _raise(agree_on_problem(_write_rows(cache, aside / _file_name(engine)), ranks=engine.ranks))
    if engine.ranks.rank == 0:
        facts = {
            "format_version": FORMAT_VERSION,
            "checkpoint": source_digest(checkpoint),
            **_identity(engine),
            "layout": dataclasses.asdict(_layout(engine)),
            "spans": [[span.start, span.stop, span.padded] for span in cache.spans],
            "content": _content_data(content),
            "messages": [dataclasses.asdict(message) for message in messages],
        }
        write_atomic(aside / SESSION_FILE, json.dumps(facts) + "\n")
        commit_folder(aside, target)
    _raise(agree_on_problem("", ranks=engine.ranks))  # nobody continues before the folder is there


def load_session(engine: Engine, folder: str | Path, *, checkpoint: str | Path) -> list[Message]:
    """Put a saved document among the engine's, and return its conversation; every rank calls it alike.

    Raises:
        CheckpointError: not a session, a damaged one, or one of another checkpoint, dtype or storage.
    """
    source = Path(folder)
    problem, found = "", None
    try:
        found = _read(engine, source, checkpoint)
    except CheckpointError as error:
        problem = str(error)
    agreed = agree_on_problem(problem, ranks=engine.ranks)
    if agreed or found is None:
        raise CheckpointError(agreed)
    content, cache, messages = found
    engine.documents.add(content, cache)
    return messages


def _raise(problem: str) -> None:
    if problem:
        raise ConfigError(problem)


def _make_folder(target: Path, aside: Path) -> str:
    if target.exists():
        return f"{target} exists; give a folder that is to be made"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        return f"{aside}: cannot be made ({error.strerror}); give another folder"
    return ""


def _file_name(engine: Engine) -> str:
    ranks = engine.ranks
    return _rank_file(Rank(tp=ranks.tp_rank, pp=ranks.pp_rank, cp=ranks.cp_rank))


def _rank_file(rank: Rank) -> str:
    return f"kv_tp{rank.tp}_pp{rank.pp}_cp{rank.cp}.safetensors"


def _identity(engine: Engine) -> dict[str, Any]:
    """What must be the same where a session is loaded."""
    return {"kv": engine.kv, "dtype": str(engine.runner.dtype).removeprefix("torch.")}


def _layout(engine: Engine) -> Layout:
    return Layout(tp=engine.plan.tp, pp=engine.plan.pp, cp=engine.plan.cp)


def _content_data(content: Content) -> dict[str, Any]:
    layout = content.layout
    return {
        "tokens": content.tokens.tolist(),
        "num_tokens": layout.num_tokens,
        "image_starts": layout.image_starts.tolist(),
        "num_tiles": layout.num_tiles.tolist(),
        "strides": layout.strides.tolist(),
        "tokens_per_tile": layout.tokens_per_tile,
        "digests": list(content.digests),
        "frequencies": list(content.frequencies),
    }


def _content(data: dict[str, Any]) -> Content:
    layout = SampleLayout(
        num_tokens=int(data["num_tokens"]),
        image_starts=np.array(data["image_starts"], dtype=np.int64),
        num_tiles=np.array(data["num_tiles"], dtype=np.int64),
        strides=np.array(data["strides"], dtype=np.int64),
        tokens_per_tile=int(data["tokens_per_tile"]),
    )
    return Content(
        tokens=np.array(data["tokens"], dtype=np.int64),
        layout=layout,
        digests=tuple(data["digests"]),
        frequencies=tuple(data["frequencies"]),
    )


def _write_rows(cache: KVCache, path: Path) -> str:
    try:
        save_file(cache.stored_rows(), path)
        write_atomic(path.with_suffix(".sha256"), _sha256(path) + "\n")
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror or error}); make room or give another folder"
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read(engine: Engine, source: Path, checkpoint: str | Path) -> tuple[Content, KVCache, list[Message]]:
    path = source / SESSION_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        wanted = {
            "format_version": FORMAT_VERSION,
            "checkpoint": source_digest(checkpoint),
            **_identity(engine),
        }
        for key, value in wanted.items():
            if facts.get(key) != value:
                raise CheckpointError(
                    f"{source}: was saved with {key} {facts.get(key)!r}, but here it is {value!r}; "
                    f"{_WAY_OUT.get(key, 'ask without it, which computes the document again')}"
                )
        content, saved = _content(facts["content"]), Layout(**facts["layout"])
        messages = [
            Message(role=m["role"], text=m["text"], images=tuple(m["images"]), videos=tuple(m["videos"]))
            for m in facts["messages"]
        ]
        spans = [Span(start=start, stop=stop, padded=padded) for start, stop, padded in facts["spans"]]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a folder that --save-session wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the session is damaged") from None
    cache = KVCache(engine.runner.place(engine.kv))
    cache.restore(*_rows(engine, source, saved, spans), engine.runner.dtype)
    return content, cache, messages


def _rows(
    engine: Engine, source: Path, saved: Layout, spans: Sequence[Span]
) -> tuple[list[Span], dict[str, Tensor]]:
    """Spans and rows of this rank, from the files of whatever ranks had them."""
    ranks, device = engine.ranks, str(engine.runner.device)
    wanted = Wanted(
        layout=_layout(engine),
        rank=Rank(tp=ranks.tp_rank, pp=ranks.pp_rank, cp=ranks.cp_rank),
        layers=[layer.layer_number for layer in engine.runner.model.language.decoder.layers],
        kv_heads=engine.arch.language.num_kv_heads,
    )

    def open_file(rank: Rank) -> Any:
        path = source / _rank_file(rank)
        if path.with_suffix(".sha256").read_text(encoding="utf-8").strip() != _sha256(path):
            raise CheckpointError(
                f"{path}: is damaged, its SHA-256 is not the one that was written; ask without it"
            )
        return safe_open(path, framework="pt", device=device)

    try:
        return resharded(open_file, saved, spans, wanted)
    except OSError as error:
        name = error.filename or source
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error})") from None
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {error}; the session is damaged, ask without it") from None
