"""Hugging Face folder -> checkpoint folder.

    header check -> side files, weights_layout.json -> state files, row by row -> checkpoint.json

No model is built: the name map gives the state keys that a model will ask for. Memory is a few blocks of 8 MiB,
whatever the size of the model. Tensors keep their dtype unless a cast is asked for, and files their order, so an
imported checkpoint exports to the files it came from, byte for byte.

Several ranks (`launched_ranks`) share the state files and write the same bytes as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_v2pe.checkpoint.convert.hf_source import (
    check_tokenizer,
    copy_side_files,
    open_hf,
    without_dropped,
)
from megatron_v2pe.checkpoint.convert.import_plan import plan_import, unread_shards
from megatron_v2pe.checkpoint.convert.shared_work import staged_by_ranks, warn_of_not_finite
from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, hf_path, read_info, state_path, write_info
from megatron_v2pe.checkpoint.files.tensor_files import WeightFile
from megatron_v2pe.checkpoint.files.weights_layout import write_layout
from megatron_v2pe.checkpoint.hf.config_json import update_dtype
from megatron_v2pe.checkpoint.hf.converted_blocks import Dtype, Progress, converted_info, silent
from megatron_v2pe.checkpoint.hf.name_map import family_name
from megatron_v2pe.checkpoint.hf.weight_files import side_files
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group, on_first_rank, rank_and_world_size
from megatron_v2pe.checkpoint.state.save import save_state


def import_hf(
    hf_folder: str | Path,
    target: str | Path,
    *,
    force: bool = False,
    dtype: Dtype = "keep",
    allow_pickle: bool = False,
    target_layout: Mapping[str, int] | None = None,
    progress: Progress = silent,
    expect: Progress = silent,
) -> CheckpointInfo:
    """Turn a Hugging Face InternVL2 folder into a checkpoint folder. Collective where there are several ranks.

    Args:
        hf_folder: config.json, safetensors, tokenizer and other files.
        target: folder to create.
        force: replace `target` if it exists, once the new one is complete.
        dtype: cast floating point tensors.
        allow_pickle: accept pickle files where there is no safetensors file.
        target_layout: parallel sizes for `CheckpointInfo.target_layout`; tensors are the same for every layout.
        progress: called with the bytes of each block.
        expect: called once, before, with all bytes of this rank.

    Raises:
        CheckpointError: everything that is wrong with the folder, in one message; or the target exists, or its
            disk is too small. Nothing is left at the target.
    """
    weights, arch, names = open_hf(hf_folder, allow_pickle=allow_pickle)
    check_tokenizer(hf_folder, arch)
    plan = plan_import(names.by_ours.values(), weights.tensors, dtype=dtype)
    kept = [_converted(without_dropped(file, names), dtype) for file in weights.files]
    not_finite: Counter[str] = Counter()
    with (
        ensure_process_group(),
        staged_by_ranks(target, force=force, needed_bytes=plan.num_bytes) as folder,
    ):
        on_first_rank(lambda: _write_hf_folder(weights.folder, folder, kept, dtype))
        mine = plan.share(*rank_and_world_size())
        expect(sum(shard.info.num_bytes for shard in mine))
        shards, unread = unread_shards(mine, weights, not_finite=not_finite, progress=progress)
        hashes = save_state(state_path(folder), shards, unread=unread, file_of=plan.file_of)
        warn_of_not_finite(not_finite, dtype)
        info = CheckpointInfo(
            kind="import",
            step=0,
            family=family_name(arch),
            num_parameters=names.num_parameters,
            target_layout=dict(target_layout or {}),
            dtype=dtype,
        )
        known = {str(state_path("") / name): digest for name, digest in hashes.items()}
        on_first_rank(lambda: write_info(folder, info, hashes=known))
    return read_info(target)


def _write_hf_folder(source: Path, folder: Path, kept: Sequence[WeightFile], dtype: Dtype) -> None:
    """`hf/` of the checkpoint, and an empty `state/`."""
    copy_side_files(source, hf_path(folder), side_files(source))
    update_dtype(hf_path(folder) / "config.json", dtype)
    write_layout(hf_path(folder), kept)
    state_path(folder).mkdir()


def _converted(file: WeightFile, dtype: Dtype) -> WeightFile:
    tensors = {name: converted_info(info, dtype) for name, info in file.tensors.items()}
    return WeightFile(file.name, tensors, file.metadata)
