"""A checkpoint folder from birth to commit.

    target.incomplete/  hf/  state/            written here, invisible to every reader
        `- checkpoint.json                     last, with size and SHA-256 of every other file, and its own
    target/                                    one rename; from here on it is a checkpoint

A folder without `checkpoint.json` is not a checkpoint, whatever else it holds. `hf/` is the Hugging Face folder
without its weights: side files byte for byte (a training checkpoint updates the position keys of config.json, nothing
else), and `weights_layout.json`, which says how the weights lay in files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_v2pe.checkpoint.files.hashing import FileRecord, Verify, digest_of, find_damage, record_files
from megatron_v2pe.checkpoint.files.tensor_files import DTYPE_NAMES, DTYPES, TensorInfo, WeightFile
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import commit_folder, write_atomic

FORMAT_VERSION = 2  # 1 had sizes of files and no hashes; it still loads
INFO_FILE = "checkpoint.json"
LAYOUT_FILE = "weights_layout.json"
INCOMPLETE_SUFFIX = ".incomplete"
_OURS = {INFO_FILE, "config.json", "adapter_config.json"}  # one of them is in every folder that is replaced
_OWN_DIGEST = "sha256_of_this"
_SPARE_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Contents of `checkpoint.json`.

    Attributes:
        kind: written by `import-hf` or by a training run.
        step: optimizer updates behind these weights; 0 for an import.
        family: language and vision family, see `hf_map.family_name`.
        num_parameters: of the whole model, without padding rows.
        run_state: `RunState` as json for a training checkpoint.
        topology: world size and parallel sizes of the writer of a training checkpoint.
        target_layout: parallel sizes that a converter was asked to check the weights for; a note, the tensors
            themselves suit every layout.
        dtype: cast that was asked for at import; `keep` when each tensor has its source's.
        files: path inside the folder -> size and hash, of every other file.
    """

    kind: Literal["import", "train"]
    step: int
    family: str
    num_parameters: int
    run_state: dict[str, Any] = field(default_factory=dict)
    topology: dict[str, int] = field(default_factory=dict)
    target_layout: dict[str, int] = field(default_factory=dict)
    dtype: str = "keep"
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def hf_path(folder: str | Path) -> Path:
    """The Hugging Face side files of a checkpoint."""
    return Path(folder) / "hf"


def state_path(folder: str | Path) -> Path:
    """The sharded tensors of a checkpoint."""
    return Path(folder) / "state"


def is_complete(folder: str | Path) -> bool:
    """True for a folder whose writer finished."""
    return (Path(folder) / INFO_FILE).is_file()


def write_info(folder: Path, info: CheckpointInfo, *, hashes: Mapping[str, str] | None = None) -> None:
    """Write `checkpoint.json`, with sizes and hashes of all other files; the last act of a writer.

    Args:
        folder: the checkpoint.
        info: everything but `files`.
        hashes: SHA-256 of files that were hashed by those who wrote them, by path in the folder; the others
            are hashed here.
    """
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / INFO_FILE]
    files = record_files(folder, paths, known=hashes)
    plain = json.loads(json.dumps(asdict(replace(info, files=files))))
    write_atomic(folder / INFO_FILE, json.dumps({**plain, _OWN_DIGEST: digest_of(plain)}, indent=2) + "\n")


def read_info(
    folder: str | Path, *, verify: Verify = "sizes", rank: int = 0, world_size: int = 1
) -> CheckpointInfo:
    """Read `checkpoint.json` and check that every file it lists is there in full.

    Args:
        folder: a checkpoint.
        verify: `full` hashes every file as well, which reads all of them.
        rank: of the processes that share the hashing; each reports what it found itself.
        world_size: how many share it.

    Raises:
        CheckpointError: no such folder, an interrupted or damaged checkpoint, or one of a newer format.
    """
    info = _parsed_info(Path(folder))
    if verify == "full" and info.format_version < 2:
        raise CheckpointError(
            f"{folder}: was written in format {info.format_version}, which has no hashes to verify in full; verify "
            "sizes, or write it again"
        )
    problems = find_damage(Path(folder), info.files, verify=verify, rank=rank, world_size=world_size)
    if problems:
        raise CheckpointError(
            f"{folder}: damaged checkpoint: {'; '.join(problems)}; restore it or use another one"
        )
    return info


def _parsed_info(folder: Path) -> CheckpointInfo:
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; `megatron-v2pe import-hf` makes one")
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {INFO_FILE}, so it is not a checkpoint; either its writer was interrupted (write it "
            "again), or this is a Hugging Face folder (import-hf turns it into a checkpoint)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format {version} is newer than this program's {FORMAT_VERSION}; update it"
            )
        own_digest = values.pop(_OWN_DIGEST, "")
        if version > 1 and own_digest != digest_of(values):
            raise CheckpointError(
                f"{path}: damaged, or edited by hand: its contents do not match their SHA-256"
            )
        files = values.pop("files")
        records = (
            {name: FileRecord(**item) for name, item in files.items()} if version > 1 else _sizes_only(files)
        )
        return CheckpointInfo(**values, files=records)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _sizes_only(files: dict[str, int]) -> dict[str, FileRecord]:
    """`files` of format 1."""
    return {name: FileRecord(size) for name, size in files.items()}


def write_layout(hf_folder: Path, files: Sequence[WeightFile]) -> None:
    """Record how the weights lay in files: names, order, dtypes, shapes, metadata."""
    values = [
        {
            "name": file.name,
            "metadata": file.metadata,
            "tensors": [
                [name, DTYPE_NAMES[info.dtype], list(info.shape)] for name, info in file.tensors.items()
            ],
        }
        for file in files
    ]
    write_atomic(hf_folder / LAYOUT_FILE, json.dumps({"files": values}))


def read_layout(hf_folder: Path) -> list[WeightFile]:
    """Read what `write_layout` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = hf_folder / LAYOUT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["files"]
        return [WeightFile(v["name"], _layout_tensors(v["tensors"]), v["metadata"]) for v in values]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; the checkpoint's hf/ folder is not one that import-hf wrote"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _layout_tensors(rows: list[list[Any]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(DTYPES[dtype], tuple(shape)) for name, dtype, shape in rows}


@contextmanager
def staged(target: str | Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into that takes the name `target` when the block ends well, and vanishes when not.

    Args:
        target: final name; must not exist unless `force`.
        force: replace what is at `target`, after the new content is complete.
        needed_bytes: what the block will write.

    Raises:
        CheckpointError: the target exists, cannot be created, or the disk has too little room.
    """
    target = Path(target)
    tmp = begin(target, force=force, needed_bytes=needed_bytes)
    try:
        yield tmp
        commit(tmp, target)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def begin(target: Path, *, force: bool, needed_bytes: int = 0) -> Path:
    """Create the empty `.incomplete` folder beside `target`; see `staged` for arguments and errors."""
    if target.exists() and not force:
        raise CheckpointError(f"{target}: exists already; choose another folder or add --force to replace it")
    if target.is_dir() and any(target.iterdir()) and not _OURS & set(os.listdir(target)):
        raise CheckpointError(
            f"{target}: is neither a checkpoint nor a Hugging Face folder; remove it yourself"
        )
    tmp = target.with_name(target.name + INCOMPLETE_SUFFIX)
    try:
        if tmp.exists():
            logger.warning("removing %s, left behind by an interrupted writer", tmp)
            shutil.rmtree(tmp)
        tmp.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{tmp}: cannot be created ({error.strerror}); choose another folder") from None
    free, needed = shutil.disk_usage(tmp).free, needed_bytes + _SPARE_BYTES
    if free < needed:
        tmp.rmdir()
        raise CheckpointError(
            f"{target}: needs {needed / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free; make room or "
            "choose another disk"
        )
    return tmp


def commit(tmp: Path, target: Path) -> None:
    """Give the finished folder its name; what was there before goes only after it has been moved out of the way."""
    replaced = target.with_name(target.name + ".replaced" + INCOMPLETE_SUFFIX)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    commit_folder(tmp, target)
    shutil.rmtree(replaced, ignore_errors=True)
