"""Checkpoint folder -> Hugging Face folder.

    weights_layout.json -> side files, index, weight files of full size -> each tensor into its place, row by row

Several ranks (`launched_ranks`) share the tensors and write the same bytes as one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from megatron_v2pe.checkpoint.convert.exported_tensors import ConvertedTensors, ExportedTensors
from megatron_v2pe.checkpoint.convert.remote_code import (
    add_remote_code,
    check_family,
    check_stride,
    record_stride,
)
from megatron_v2pe.checkpoint.convert.shared_work import staged_by_ranks, warn_of_not_finite
from megatron_v2pe.checkpoint.convert.side_files import files_of_other_format
from megatron_v2pe.checkpoint.files.block_stream import BlockStream
from megatron_v2pe.checkpoint.files.folder import expert_bias_of, hf_path, read_info
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.checkpoint.files.weights_layout import LAYOUT_FILE, read_layout
from megatron_v2pe.checkpoint.hf.config_json import update_dtype
from megatron_v2pe.checkpoint.hf.converted_blocks import Dtype, Progress, silent
from megatron_v2pe.checkpoint.hf.weight_files import INDEX_FILE, index_text, plan_weight_files, side_files
from megatron_v2pe.checkpoint.state.ranks import (
    ensure_process_group,
    on_all_ranks,
    on_first_rank,
    rank_and_world_size,
)
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.arch.native import FolderFormat
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

logger = logging.getLogger(__name__)
SHARD_BYTES = 5_000_000_000
"""Largest weight file where the files of a folder are planned anew; transformers' own habit."""


def export_hf(
    checkpoint_folder: str | Path,
    target: str | Path,
    *,
    force: bool = False,
    dtype: Dtype = "keep",
    max_shard_bytes: int = 0,
    to: FolderFormat | None = None,
    stride: int | None = None,
    remote_code: bool = False,
    drop_expert_bias: bool = False,
    progress: Progress = silent,
    expect: Progress = silent,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder. Collective where there are several ranks.

    Args:
        checkpoint_folder: written by `import_hf` or by training; adapters are merged into their base.
        target: folder to create.
        force: replace `target` if it exists, once the new one is complete.
        dtype: cast floating point tensors.
        max_shard_bytes: largest weight file; 0 keeps the files of the imported folder, or in another format than its
            own makes files of `SHARD_BYTES`.
        to: format of the folder; None is that of the imported one.
        stride: stride to recommend for a checkpoint that was trained with random ones; None records nothing.
        remote_code: put code beside the weights, with which transformers loads them without this package.
        drop_expert_bias: write a checkpoint whose experts were balanced by a bias (`moe.bias_rate`) without it.
        progress: called with the bytes of each block.
        expect: called once, before, with all bytes of this rank.

    Raises:
        ConfigError: the stride is none that was trained.
        CheckpointError: not a complete checkpoint, a tensor is missing, the format cannot hold the model, or the target
            cannot be written.
    """
    read_info(checkpoint_folder)
    check_expert_bias(checkpoint_folder, is_dropped=drop_expert_bias)
    hf = hf_path(checkpoint_folder)
    check_stride(hf / "config.json", stride)
    is_other = to not in (None, read_architecture(hf).folder_format)
    if remote_code:
        check_family(hf / "config.json", to=to)
    exported = ExportedTensors(checkpoint_folder, dtype=dtype, progress=progress, in_other_format=is_other)
    if is_other:
        _, copied = files_of_other_format(hf)
        files = plan_weight_files(exported.infos(), max_shard_bytes=max_shard_bytes or SHARD_BYTES)
    else:
        paths = [path for path in side_files(hf) if str(path) != LAYOUT_FILE]
        copied = {str(path): (hf / path).read_bytes() for path in paths}
        files = [exported.as_stored(file) for file in read_layout(hf)]
        if max_shard_bytes:
            files = plan_weight_files(_tensors_of(files), max_shard_bytes=max_shard_bytes)

    def finish(folder: Path) -> None:
        record_stride(folder / "config.json", stride)
        if remote_code:
            add_remote_code(folder)

    write_folder(target, exported, files, copied, force=force, dtype=dtype, expect=expect, finish=finish)


def check_expert_bias(checkpoint_folder: str | Path, *, is_dropped: bool) -> None:
    """Refuse to lose a bias of the choice of experts, which no Hugging Face format of these models can hold.

    Raises:
        CheckpointError: the checkpoint has one, and it is not to be dropped.
    """
    table = expert_bias_of(checkpoint_folder)
    if not any(value for values in table.values() for value in values):
        return
    largest = max(abs(value) for values in table.values() for value in values)
    found = (
        f"{checkpoint_folder}: its routers choose experts with a bias (moe.bias_rate; {len(table)} layers, up to "
        f"{largest:.3g})"
    )
    if is_dropped:
        logger.warning("%s, which is left out: the exported model chooses other experts", found)
        return
    raise CheckpointError(
        f"{found}, for which the released formats have no place; the exported model would choose other experts. Add "
        "--drop-expert-bias to export it without, and evaluate that model"
    )


def _tensors_of(files: Sequence[WeightFile]) -> dict[str, TensorInfo]:
    return {name: tensor for file in files for name, tensor in file.tensors.items()}


def write_folder(
    target: str | Path,
    tensors: ConvertedTensors,
    files: Sequence[WeightFile],
    side_contents: Mapping[str, bytes],
    *,
    force: bool,
    dtype: Dtype,
    expect: Progress,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a Hugging Face folder: side files, index, tensors. Collective where there are several ranks.

    Args:
        target: folder to create.
        tensors: what is written.
        files: where each tensor lies.
        side_contents: path in the folder -> contents, of everything but weights.
        force: replace `target` if it exists.
        dtype: of a cast, for config.json.
        expect: called once, before, with all bytes of this rank.
        finish: called on rank 0 with the folder, before its tensors are written.
    """
    needed_bytes = sum(file.num_bytes for file in files)
    with ensure_process_group(), staged_by_ranks(target, force=force, needed_bytes=needed_bytes) as folder:
        on_first_rank(lambda: _write_all_but_tensors(folder, side_contents, files, dtype))
        on_first_rank(lambda: finish(folder))
        mine = _share(files, *rank_and_world_size())
        expect(sum(file.tensors[name].num_bytes for file, names in mine for name in names))
        on_all_ranks(lambda: _write_tensors(folder, mine, tensors))
        warn_of_not_finite(tensors.not_finite, dtype)


def _write_all_but_tensors(
    folder: Path, side_contents: Mapping[str, bytes], files: Sequence[WeightFile], dtype: Dtype
) -> None:
    """Side files, index, and weight files of their final size with a header."""
    for path, contents in side_contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    update_dtype(folder / "config.json", dtype)
    _write_index(folder, files)
    for file in files:
        with (folder / file.name).open("wb") as stream:
            header = file.header()
            stream.write(header)
            stream.truncate(len(header) + file.num_bytes)


def _write_index(folder: Path, files: Sequence[WeightFile]) -> None:
    """Keep the index that was copied with the side files if it is true of `files`, else write or remove it."""
    path = folder / INDEX_FILE
    weight_map = {name: file.name for file in files for name in file.tensors}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["weight_map"] == weight_map:
        return
    path.unlink(missing_ok=True)
    if len(files) > 1:
        write_atomic(path, index_text(files))


def _share(files: Sequence[WeightFile], rank: int, world_size: int) -> list[tuple[WeightFile, list[str]]]:
    """The tensors that a rank writes, file by file: those that begin in its equal range of all bytes."""
    total = sum(file.num_bytes for file in files)
    first = total * rank // world_size
    stop = total * (rank + 1) // world_size
    share = []
    file_start = 0
    for file in files:
        starts = file.offsets()
        names = [name for name in file.tensors if first <= file_start + starts[name] < stop]
        if names:
            share.append((file, names))
        file_start += file.num_bytes
    return share


def _write_tensors(
    folder: Path, share: Iterable[tuple[WeightFile, Iterable[str]]], exported: ConvertedTensors
) -> None:
    with BlockStream() as stream:
        for file, names in share:
            stream.open(folder / file.name)
            data_start = len(file.header())
            starts = file.offsets()
            for name in names:
                stream.position = data_start + starts[name]
                stream.put_blocks(exported.blocks(name))
            stream.close()
