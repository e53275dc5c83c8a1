"""The release's meta json: which annotation files make up the training mixture, and how often each is drawn.

{"name": {"annotation": "a.jsonl", "root": "images/", "repeat_time": 0.5, "data_augment": true, ...}, ...}
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.config.schema import MOST_TILES
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.sources import storage
from megatron_v2pe.data.sources.file_kinds import HEAD_BYTES, kind_of

_KNOWN: dict[str, tuple[type, ...]] = {
    "annotation": (str,),
    "root": (str, type(None)),
    "root2": (str, type(None)),
    "http_root": (str, type(None)),
    "repeat_time": (int, float),
    "data_augment": (bool,),
    "max_dynamic_patch": (int,),
    "dynamic_image_size": (bool,),
    "min_num_frame": (int,),
    "max_num_frame": (int,),
    "video_fps": (int, float),
    "format": (str,),
    "system": (str,),
    "length": (int,),  # informational, as in the release; the file itself is counted
}
FORMATS = ("auto", "internvl", "sharegpt", "openai", "llama_factory", "ms_swift", "llava_video")
_MOST_META_BYTES = 64 * 2**20
_MOST_REPEATS = 100_000  # of the release's recipes 16.668 is the largest


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One data set of the mixture.

    Attributes:
        name: key of the meta json; with the line number it names a sample.
        annotation: path of the jsonl file.
        root: folder that image paths are relative to; empty means they are complete.
        root2: preferred to `root` by samples with a list of images; empty means absent.
        http_root: prefix of the files that replace web addresses (prefix + sha256 of the address).
        repeat_time: how often a sample is drawn per epoch; the fraction is drawn anew each epoch.
        data_augment: re-encode tiles as JPEG of random quality.
        max_dynamic_patch: overrides `data.max_dynamic_patch`; None keeps it.
        dynamic_image_size: overrides `data.dynamic_image_size`; None keeps it.
        min_num_frame: overrides `data.min_num_frame`; None keeps it.
        max_num_frame: overrides `data.max_num_frame`; None keeps it.
        video_fps: frames per second of folders of frames, which clips of them need.
        format: how records are written, one of `FORMATS`; `auto` recognises each.
        system: system text of records that have none; empty uses the template's.
    """

    name: str
    annotation: str
    root: str = ""
    root2: str = ""
    http_root: str = ""
    repeat_time: float = 1.0
    data_augment: bool = False
    max_dynamic_patch: int | None = None
    dynamic_image_size: bool | None = None
    min_num_frame: int | None = None
    max_num_frame: int | None = None
    video_fps: float | None = None
    format: str = "auto"
    system: str = ""


def read_meta(path: str | Path) -> tuple[DatasetEntry, ...]:
    """Read a meta json.

    Relative paths in it are looked up beside the meta file first, then in the current folder, where the
    release looks.

    Raises:
        DataError: missing or malformed file, unknown or missing key, wrong type, missing annotation file.
    """
    path = Path(path)
    try:
        with storage.open_binary(str(path)) as file:
            content = file.read(_MOST_META_BYTES + 1)
        if len(content) > _MOST_META_BYTES:
            raise ValueError(
                f"more than {_MOST_META_BYTES} bytes; annotations belong into files of their own"
            )
        kind = kind_of(content[:HEAD_BYTES])
        if kind:
            raise ValueError(f"it is {kind}")
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_distinct_keys)
    except FileNotFoundError:
        raise DataError(f"data.meta: {path}: no such file; give the meta json of the data sets") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.meta: {path}: not valid json ({error})") from None
    first = values[0] if isinstance(values, list) and values else values
    if isinstance(first, dict) and ("conversations" in first or "messages" in first):
        raise DataError(
            f"data.meta: {path}: holds records, not a list of data sets; name their file as 'annotation' of a "
            "meta json: "
            '{"NAME": {"annotation": "FILE.jsonl", "root": "FOLDER", "repeat_time": 1, "data_augment": false}}'
        )
    if not isinstance(values, dict) or not values:
        raise DataError(f"{path}: must hold a json object of at least one data set: name -> settings")
    return tuple(_parse_entry(name, entry, path) for name, entry in values.items())


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of json, where a name given twice would silently replace a data set or a setting."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shortened(twice)} is given twice in one object; rename or remove one")
    return values


def _parse_entry(name: str, entry: Any, path: Path) -> DatasetEntry:
    where = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object with annotation, root, repeat_time, data_augment")
    for key, value in entry.items():
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_KNOWN)}"
            raise DataError(f"{where}: unknown key {shortened(key)}; {hint}")
        is_bool_for_number = isinstance(value, bool) and bool not in _KNOWN[key]
        if not isinstance(value, _KNOWN[key]) or is_bool_for_number:
            wanted = " or ".join(kind.__name__ for kind in _KNOWN[key])
            raise DataError(f"{where}: {key} is {shortened(value)}, but must be {wanted}")
    _check_values(entry, where)
    annotation = _locate(entry["annotation"], path)
    _require_file(annotation, entry["annotation"], where)
    own = ("max_dynamic_patch", "dynamic_image_size", "min_num_frame", "max_num_frame", "video_fps")
    return DatasetEntry(
        name=name,
        annotation=annotation,
        root=_locate(entry.get("root"), path),
        root2=_locate(entry.get("root2"), path),
        http_root=storage.check_address(entry.get("http_root") or "", where=where),
        repeat_time=float(entry["repeat_time"]),
        data_augment=entry["data_augment"],
        **{key: entry.get(key) for key in own},
        format=entry.get("format") or "auto",
        system=entry.get("system") or "",
    )


def _check_values(entry: dict[str, Any], where: str) -> None:
    for key in ("annotation", "repeat_time", "data_augment"):
        if key not in entry:
            raise DataError(f"{where}: key {key!r} is missing")
    if not 0 < entry["repeat_time"] <= _MOST_REPEATS:  # also refuses NaN
        raise DataError(
            f"{where}: repeat_time is {entry['repeat_time']}, but must be positive and at most {_MOST_REPEATS}"
        )
    if entry.get("format", "auto") not in FORMATS:
        raise DataError(
            f"{where}: format is {shortened(entry['format'])}, but must be one of {', '.join(FORMATS)}"
        )
    if not 1 <= entry.get("max_dynamic_patch", 1) <= MOST_TILES:
        raise DataError(
            f"{where}: max_dynamic_patch is {entry['max_dynamic_patch']}, but must lie in 1..{MOST_TILES}"
        )
    for key in ("min_num_frame", "max_num_frame", "video_fps"):
        if not 0 < entry.get(key, 1) < math.inf:
            raise DataError(f"{where}: {key} is {entry[key]}, but must be positive")


def _require_file(annotation: str, name: str, where: str) -> None:
    try:
        if storage.is_file(annotation):
            return
    except OSError as error:
        raise DataError(f"{where}: annotation {shortened(name, 400)}: {error.strerror}") from None
    place = "there" if storage.is_remote(annotation) else "beside the meta file nor in the current folder"
    raise DataError(
        f"{where}: annotation {shortened(name, 400)} is {'not' if place == 'there' else 'neither'} {place}"
    )


def _locate(name: str | None, meta_path: Path) -> str:
    """A path of the meta file: an address unchanged, a path beside the meta file if it exists there."""
    if not name:
        return ""
    if storage.is_remote(name):
        return storage.check_address(name, where=str(meta_path))
    beside = meta_path.parent / name
    return str(beside if beside.exists() else Path(name))
