"""Which files of a Hugging Face folder hold its weights, and which are side files.

folder/  model.safetensors                                   one file
model-0000k-of-0000n.safetensors + index.json       or shards, with an index: tensor -> file
pytorch_model*.bin                                  the same as pickle, only where it is allowed
everything else                                     configuration, tokenizer, code: side files
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.core.plain_files import foreign_content, not_regular, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_PICKLE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
"""Files that hold weights in some form; none of them is a side file."""
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MAX_SIDE_BYTES = 256 * 2**20
"""Of one side file, which is copied into every checkpoint; tokenizer.json of a published InternVL has 11 MiB."""
_POINTER_BYTES = 1024  # a git-lfs pointer has about 130
SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")


@dataclass(frozen=True)
class WeightListing:
    """The weight files that a folder names; whether they exist and agree is checked when they are opened.

    Attributes:
        names: files, sorted.
        index_path: the index that applies, whether it exists or not.
        index: tensor -> file; empty without an index.
        problems: why files cannot be named, one sentence each.
    """

    names: list[str]
    index_path: Path
    index: dict[str, str]
    problems: list[str]

    def disagreements(self, file_of: Mapping[str, str]) -> Iterator[str]:
        """Differences between the index and the files, one sentence each.

        Args:
            file_of: tensor -> file in which it was found.
        """
        opened = set(file_of.values())
        for name, file in self.index.items():
            if file in opened and file_of.get(name) != file:
                yield f"{self.index_path}: names {shortened(name)} in {file}, but it is not there"
        if self.index:
            for name in sorted(set(file_of) - set(self.index)):
                path = self.index_path.with_name(file_of[name])
                yield f"{path}: holds {shortened(name)}, which {self.index_path.name} omits"


def list_weight_files(folder: Path, *, allow_pickle: bool) -> WeightListing:
    """Find the weight files of a folder: by its index, else by their names.

    Args:
        folder: a folder that exists.
        allow_pickle: accept pickle files where there is no safetensors file.
    """
    is_pickle = allow_pickle and not any(folder.glob("*.safetensors*"))
    index_path = folder / (PICKLE_INDEX_FILE if is_pickle else INDEX_FILE)
    index, problems = _read_index(index_path)
    if index:
        problems += _two_sets(folder, set(index.values()), f"the files of {index_path.name}")
        return WeightListing(sorted(set(index.values())), index_path, index, problems)
    names, missing = _names_without_index(folder, allow_pickle=allow_pickle)
    return WeightListing(names, index_path, index, problems + missing)


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """Tensor -> file, and problems; files outside the folder are left out."""
    if not path.is_file():
        return {}, []
    try:
        index = read_json_object(path).get("weight_map")
    except CheckpointError as error:
        return {}, [str(error)]
    if not isinstance(index, dict) or not all(isinstance(file, str) and file for file in index.values()):
        return {}, [f"{path}: not a weights index, weight_map must be an object of tensor -> file name"]
    outside = sorted({file for file in index.values() if Path(file).name != file or "\0" in file})
    problems = [f"{path}: names files outside the folder: {', '.join(outside)}"] if outside else []
    return {name: file for name, file in index.items() if file not in outside}, problems


def _names_without_index(folder: Path, *, allow_pickle: bool) -> tuple[list[str], list[str]]:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_FILE in found:
        shards = [name for name in found if _SHARD.fullmatch(name)]
        return [SINGLE_FILE], _two_sets(folder, set(shards), f"{len(shards)} shards") if shards else []
    if len(found) > 1:
        return [], [f"{folder}: {len(found)} safetensors files but no {INDEX_FILE}"]
    return (found, []) if found else _pickle_names(folder, allow_pickle=allow_pickle)


def _two_sets(folder: Path, names: set[str], what: str) -> list[str]:
    """A single file beside shards, of which nobody can know which are meant."""
    if SINGLE_FILE in names or not (folder / SINGLE_FILE).exists():
        return []
    return [
        f"{folder}: has {SINGLE_FILE} and {what}, two sets of weights; move away the one that is not meant (saving "
        "again into a folder leaves the old files)"
    ]


def _pickle_names(folder: Path, *, allow_pickle: bool) -> tuple[list[str], list[str]]:
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not found:
        return [], [f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}{_instead(folder)}"]
    if not allow_pickle:
        return [], [
            f"{folder}: the weights are pickle files ({found[0]}), which can run code when they are opened; save them "
            "as safetensors first (save_pretrained(..., safe_serialization=True)), or let --allow-pickle read them, "
            "tensors only"
        ]
    if SINGLE_PICKLE in found:  # others may be the optimizer's, or arguments of a training script
        return [SINGLE_PICKLE], []
    if len(found) > 1:
        return [], [f"{folder}: {len(found)} pickle files but no {PICKLE_INDEX_FILE}"]
    return found, []


_OTHER_WEIGHTS = {
    "global_step*": "a DeepSpeed checkpoint; its zero_to_fp32.py writes weights",
    "**/*.distcp": "a distributed checkpoint of torch (FSDP); accelerate merge-weights writes safetensors",
    "*.gguf": "GGUF weights, which are quantised; import the folder they were made from",
    "*.incomplete": "a download that was not finished; download it again",
    "*.aria2": "a download that was not finished; download it again",
    "*.ckpt": "a checkpoint of another program; save it with save_pretrained",
    "*.msgpack": "weights of Flax; save them with save_pretrained",
    "*.h5": "weights of TensorFlow; save them with save_pretrained",
    "*.onnx": "an ONNX graph; import the folder it was made from",
    "checkpoint-*": "a folder of training; give one of its checkpoint-* folders",
}


def _instead(folder: Path) -> str:
    """What is there in the place of weights, for the end of a message; empty for nothing that is known."""
    for pattern, what in _OTHER_WEIGHTS.items():
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return f"; {found.relative_to(folder)} is {what}"
    return ""


def side_files(folder: Path) -> list[Path]:
    """Paths, relative to the folder, of everything that is not weights, sorted.

    Raises:
        CheckpointError: one of them is a link out of the folder, or no file, see `require_inside`.
    """
    found = _side_files(folder)
    for path in found:
        require_inside(folder, path)
    return found


def _side_files(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - set(SKIPPED_FOLDERS))
        found += [(Path(root) / name).relative_to(folder) for name in names]
    return sorted(path for path in found if _is_side_file(path))


def outside_or_odd(folder: Path) -> list[str]:
    """Side files that are not copied: links to what is outside of the folder, pipes, devices; one sentence each."""
    found = []
    for path in _side_files(folder) if folder.is_dir() else ():
        try:
            require_inside(folder, path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def require_inside(folder: Path, path: Path) -> None:
    """Refuse a side file that is a link out of its folder, no regular file, or larger than `MAX_SIDE_BYTES`.

    The blobs of the Hugging Face cache, to which all files of a snapshot are links, belong to the folder.

    Raises:
        CheckpointError: names the file, and the target of a link.
    """
    root, whole = folder.resolve(), folder / path
    try:
        target = whole.resolve(strict=True)
        odd = not_regular(whole)
        num_bytes = whole.stat().st_size
    except (OSError, RuntimeError):
        raise CheckpointError(f"{whole}: is a link to nothing, or cannot be read; remove it") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{whole}: is a link to {target}, outside of the folder, and is not followed; copy the file into the "
            "folder if it belongs there, or remove the link"
        )
    if odd:
        raise CheckpointError(f"{whole}: {odd}; remove it")
    foreign = foreign_content(_head(whole)) if num_bytes < _POINTER_BYTES else ""
    if foreign:
        raise CheckpointError(f"{whole}: {foreign}")
    if num_bytes > MAX_SIDE_BYTES:
        raise CheckpointError(
            f"{whole}: has {num_bytes:,} bytes, but is no weight file that is read here, and other files would be "
            f"copied into every checkpoint; move it away (at most {MAX_SIDE_BYTES:,} bytes)"
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_POINTER_BYTES)


def _is_side_file(path: Path) -> bool:
    """Neither weights nor an index of pickles: an export would copy that index without the files that it names."""
    return path.suffix not in WEIGHT_SUFFIXES and path.name != PICKLE_INDEX_FILE


def plan_weight_files(tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int) -> list[WeightFile]:
    """Fill files in order up to `max_shard_bytes`; a larger tensor gets a file of its own."""
    groups: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in tensors.items():
        if info.num_bytes > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = info
        room -= info.num_bytes
    names = _shard_names(len(groups))
    return [WeightFile(name, group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)]


def _shard_names(count: int) -> Iterable[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_text(files: Sequence[WeightFile]) -> str:
    """Contents of `model.safetensors.index.json` for these files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
