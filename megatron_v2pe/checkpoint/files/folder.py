"""A checkpoint folder, and `checkpoint.json`, which makes it one.

    checkpoint.json    what it is, with size and SHA-256 of every other file and of itself; written last
    hf/                the Hugging Face folder without its weights: side files byte for byte (a training checkpoint
                       updates the position keys of config.json, nothing else), and `weights_layout.json`
    state/             sharded tensors

A folder without `checkpoint.json` is not a checkpoint, whatever else it contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from megatron_v2pe.checkpoint.files.hashing import (
    FileRecord,
    VerifyLevel,
    digest_of,
    find_damage,
    record_files,
)
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.plain_files import read_json_object

FORMAT_VERSION = 2
INFO_FILE = "checkpoint.json"
STEP_FOLDER = re.compile(r"step_(\d{8,18})")
_OWN_DIGEST = "sha256_of_this"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Contents of `checkpoint.json`.

    Attributes:
        kind: written by `import-hf` or by a training run.
        step: optimizer updates that these weights have had; 0 for an import.
        family: language and vision family, see `name_map.family_name`.
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

    def __post_init__(self) -> None:
        wanted: dict[str, type] = {
            **dict.fromkeys(("step", "num_parameters"), int),
            **dict.fromkeys(("family", "dtype"), str),
            **dict.fromkeys(("run_state", "topology", "target_layout"), dict),
        }
        for name, kind in wanted.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is {str(getattr(self, name))[:60]!r}, expected {kind.__name__}")
        if self.kind not in ("import", "train") or self.step < 0:
            raise ValueError(f"kind is {self.kind!r} and step {self.step}")
        if self.run_state and self.run_state.get("step") != self.step:
            raise ValueError(
                f"step is {self.step}, but its run state is of step {self.run_state.get('step')}"
            )


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
    folder: str | Path, *, verify: VerifyLevel = "sizes", rank: int = 0, world_size: int = 1
) -> CheckpointInfo:
    """Read `checkpoint.json` and check that every file it lists is there in full.

    Args:
        folder: a checkpoint.
        verify: `full` hashes every file as well, which reads all of them.
        rank: of the processes that share the hashing; each reports what it found itself.
        world_size: how many share it.

    Raises:
        CheckpointError: no such folder, an interrupted or damaged checkpoint, or one of another format.
    """
    info = _parsed_info(Path(folder))
    problems = find_damage(Path(folder), info.files, verify=verify, rank=rank, world_size=world_size)
    if problems:
        raise CheckpointError(
            f"{folder}: damaged checkpoint: {'; '.join(problems)}; restore it or use another one"
        )
    return info


def expert_bias_of(checkpoint_folder: str | Path) -> dict[str, list[float]]:
    """The bias of the choice of experts that a checkpoint stores, by sparse layer; empty for one without.

    Raises:
        CheckpointError: not a complete checkpoint.
    """
    return dict(read_info(checkpoint_folder).run_state.get("expert_bias", {}))


def _parsed_info(folder: Path) -> CheckpointInfo:
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; `megatron-v2pe import-hf` makes one")
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {INFO_FILE}, so it is not a checkpoint; either its writer was interrupted (write it "
            "again), or this is a Hugging Face folder (import-hf turns it into a checkpoint; model.hf_path of a "
            "run, generate and evaluate read it as it is)"
        )
    try:
        values = read_json_object(path)
        _require_format(path, values["format_version"])
        if values.pop(_OWN_DIGEST, "") != digest_of(values):
            raise CheckpointError(
                f"{path}: damaged, or edited by hand: its contents do not match their SHA-256"
            )
        files = {_inner(name): FileRecord(**item) for name, item in values.pop("files").items()}
        info = CheckpointInfo(**values, files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    _require_own_name(folder, info)
    return info


def _inner(name: str) -> str:
    """The name of a file inside the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} is outside of the folder")
    return name


def _require_own_name(folder: Path, info: CheckpointInfo) -> None:
    """A step folder holds the step that it is named after, else one step would be continued as another."""
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and info.kind == "train" and int(named[1]) != info.step:
        raise CheckpointError(
            f"{folder}: is named after step {int(named[1])}, but holds step {info.step}; give it its own name "
            f"(step_{info.step:08d}) back"
        )


def _require_format(path: Path, version: int) -> None:
    if type(version) is not int:
        raise TypeError(f"format_version is {str(version)[:60]!r}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version} is newer than this program's {FORMAT_VERSION}; update it"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version} is older than this program's {FORMAT_VERSION} and was never released; import "
            "or train the weights again"
        )
