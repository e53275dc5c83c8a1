"""import: Hugging Face folder -> checkpoint folder. export: the way back.

    import   header check -> side files, weights_layout.json -> shards, each read when it is written -> checkpoint.json
    export   weights_layout.json -> for each tensor: read ours, undo the transform, append its bytes

No model is built: the name map says which state keys a model will ask for. Memory holds one parameter at a time
(export keeps `linear_fc1` from its gate to its up part). Tensors keep their dtype, files their order, so an
imported checkpoint exports to the files it came from, byte for byte.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_v2pe.checkpoint.dist_io import ReadLater, StateReader, raise_together, save_state
from megatron_v2pe.checkpoint.folder import (
    LAYOUT_FILE,
    CheckpointInfo,
    hf_path,
    read_info,
    read_layout,
    staged,
    state_path,
    write_info,
    write_layout,
)
from megatron_v2pe.checkpoint.hf_io import (
    INDEX_FILE,
    HFWeights,
    TensorInfo,
    WeightFile,
    index_text,
    plan_shards,
    write_weight_file,
)
from megatron_v2pe.checkpoint.hf_map import Entry, NameMap, family_name, name_map
from megatron_v2pe.config.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called with the bytes of each tensor that has been converted."""


def _silent(num_bytes: int) -> None:
    """Progress that nobody watches."""


def import_hf(
    hf_folder: str | Path, target: str | Path, *, force: bool = False, progress: Progress = _silent
) -> CheckpointInfo:
    """Turn a Hugging Face InternVL2 folder into a checkpoint folder.

    Args:
        hf_folder: config.json, safetensors, tokenizer and other files.
        target: folder to create.
        force: replace `target` if it is there, once the new one is complete.
        progress: told the bytes of each tensor.

    Raises:
        CheckpointError: everything that is wrong with the folder, in one message; or the target exists, or its
            disk is too small. Nothing is left behind.
    """
    weights, arch, names = open_hf(hf_folder)
    kept = [without_dropped(file, names) for file in weights.files]
    with staged(target, force=force, needed_bytes=sum(file.num_bytes for file in kept)) as folder:
        hf = hf_path(folder)
        copy_side_files(weights.folder, hf, weights.side_files())
        write_layout(hf, kept)
        state_path(folder).mkdir()
        shards, read_later = _shards(names.by_ours.values(), weights, progress)
        save_state(state_path(folder), shards, read_later=read_later)
        family, num_parameters = family_name(arch), names.num_parameters
        write_info(
            folder, CheckpointInfo(kind="import", step=0, family=family, num_parameters=num_parameters)
        )
    return read_info(target)


def export_hf(
    checkpoint_folder: str | Path,
    target: str | Path,
    *,
    force: bool = False,
    max_shard_bytes: int = 0,
    progress: Progress = _silent,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder.

    Args:
        checkpoint_folder: written by `import_hf` or by training.
        target: folder to create.
        force: replace `target` if it is there, once the new one is complete.
        max_shard_bytes: largest weight file; 0 keeps the files of the imported folder.
        progress: told the bytes of each tensor.

    Raises:
        CheckpointError: not a complete checkpoint, a tensor is missing, or the target cannot be written.
    """
    read_info(checkpoint_folder)
    hf = hf_path(checkpoint_folder)
    exported = ExportedTensors(checkpoint_folder, progress=progress)
    files = [exported.as_stored(file) for file in read_layout(hf)]
    if max_shard_bytes:
        everything = {name: tensor for file in files for name, tensor in file.tensors.items()}
        files = plan_shards(everything, max_shard_bytes=max_shard_bytes)
    with staged(target, force=force, needed_bytes=sum(file.num_bytes for file in files)) as folder:
        side_files = HFWeights(hf).side_files()
        copy_side_files(hf, folder, [path for path in side_files if str(path) != LAYOUT_FILE])
        for file in files:
            write_weight_file(folder, file=file, read=exported.read)
        _write_index(folder, files)


class ExportedTensors:
    """A checkpoint's tensors under their Hugging Face names.

    Args:
        checkpoint_folder: a complete checkpoint.
        progress: told the bytes of each tensor that is read.

    Raises:
        CheckpointError: the checkpoint lacks parameters of its own architecture.
    """

    def __init__(self, checkpoint_folder: str | Path, *, progress: Progress = _silent) -> None:
        self.names = name_map(read_architecture(hf_path(checkpoint_folder)))
        self.state = StateReader(state_path(checkpoint_folder))
        self._progress = progress
        self._waiting: dict[str, Tensor] = {}
        missing = sorted(set(self.names.by_ours) - set(self.state.tensors))
        raise_together(f"{checkpoint_folder}: lacks parameters", missing)

    def as_stored(self, file: WeightFile) -> WeightFile:
        """The same file with the dtypes that the checkpoint holds (a bfloat16 run of a float32 import)."""
        unknown = sorted(set(file.tensors) - set(self.names.by_hf))
        raise_together(f"{self.state.folder.parent}: {LAYOUT_FILE} names unknown tensors", unknown)
        dtypes = {name: self.state.tensors[self.names.by_hf[name].ours].dtype for name in file.tensors}
        tensors = {name: TensorInfo(dtypes[name], info.shape) for name, info in file.tensors.items()}
        return WeightFile(file.name, tensors, file.metadata)

    def read(self, hf_name: str) -> Tensor:
        """One Hugging Face tensor; parts of the same parameter that were not asked for yet are kept."""
        if hf_name not in self._waiting:
            entry = self.names.by_hf[hf_name]
            parts = entry.to_hf(self.state.read(entry.ours))
            self._waiting.update(zip(entry.hf, parts, strict=True))
        tensor = self._waiting.pop(hf_name)
        self._progress(tensor.numel() * tensor.itemsize)
        return tensor


def open_hf(hf_folder: str | Path) -> tuple[HFWeights, InternVLArchitecture, NameMap]:
    """Open a Hugging Face folder and check all of it: files, architecture, names, shapes.

    Raises:
        CheckpointError: one message with every problem found.
    """
    weights = HFWeights(hf_folder)
    problems = list(weights.problems)
    names = None
    try:
        arch = read_architecture(hf_folder)
        names = name_map(arch)
    except CheckpointError as error:
        problems.append(str(error))
    if names is not None and weights.files:
        problems += _compare(weights.tensors, names, is_whole=not weights.problems)
    raise_together(f"{hf_folder}: cannot be imported", problems)
    assert names is not None
    return weights, arch, names


def _compare(tensors: dict[str, TensorInfo], names: NameMap, *, is_whole: bool) -> Iterable[str]:
    """Differences between the tensors of a folder and those its config.json asks for."""
    for name, info in tensors.items():
        entry = names.by_hf.get(name)
        if entry is None and not names.drop_reason(name):
            yield f"{name}: this architecture has no such tensor"
        elif entry is not None and info.shape != names.hf_shape(name):
            yield f"{name}: has shape {info.shape}, config.json makes it {names.hf_shape(name)}"
    if is_whole:  # else a missing file has been reported, not each of its tensors
        yield from (f"{name}: missing" for name in names.by_hf if name not in tensors)
    for entry in names.by_ours.values():
        dtypes = {tensors[name].dtype for name in entry.hf if name in tensors}
        if len(dtypes) > 1:
            yield f"{', '.join(entry.hf)}: different dtypes, but together they are one parameter"


def _shards(
    entries: Iterable[Entry], weights: HFWeights, progress: Progress
) -> tuple[dict[str, Any], ReadLater]:
    """Descriptions of all shards, and how to read each when its turn comes.

    Parts that lie one after another in our tensor become shards of their own and are never put together.
    """
    shards: dict[str, Any] = {}
    readers: dict[tuple[str, tuple[int, ...]], Callable[[], Tensor]] = {}
    for entry in entries:
        groups = [(name,) for name in entry.hf] if entry.transform.is_stacked else [entry.hf]
        for i, group in enumerate(groups):
            like = [_meta(weights.tensors[name]) for name in group]
            meta = like[0] if entry.transform.is_stacked else entry.transform.to_ours(like)
            shard = ShardedTensor.from_rank_offsets(entry.ours, meta, (0, i, len(groups)))
            shards[f"{entry.ours}/{i}"] = shard
            readers[entry.ours, tuple(shard.global_offset)] = partial(
                _read_group, weights, entry=entry, group=group, progress=progress
            )
    return shards, readers


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _read_group(weights: HFWeights, *, entry: Entry, group: tuple[str, ...], progress: Progress) -> Tensor:
    parts = [weights.read(name) for name in group]
    progress(sum(part.numel() * part.itemsize for part in parts))
    return parts[0] if entry.transform.is_stacked else entry.transform.to_ours(parts)


def without_dropped(file: WeightFile, names: NameMap) -> WeightFile:
    """The file without the tensors that the table drops; each is logged with its reason."""
    dropped = {name: names.drop_reason(name) for name in file.tensors if name not in names.by_hf}
    for name, reason in dropped.items():
        logger.warning("%s: left out of the checkpoint, %s", name, reason)
    tensors = {name: info for name, info in file.tensors.items() if name not in dropped}
    return WeightFile(file.name, tensors, file.metadata)


def copy_side_files(source: Path, target: Path, paths: Iterable[Path]) -> None:
    """Copy files, byte for byte, to the same relative paths below `target`."""
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def _write_index(folder: Path, files: list[WeightFile]) -> None:
    """Keep the index that came with the side files if it is true of `files`, else write or remove it."""
    path = folder / INDEX_FILE
    weight_map = {name: file.name for file in files for name in file.tensors}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["weight_map"] == weight_map:
        return
    path.unlink(missing_ok=True)
    if len(files) > 1:
        write_atomic(path, index_text(files))
