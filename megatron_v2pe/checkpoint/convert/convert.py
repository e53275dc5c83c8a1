"""import: Hugging Face folder -> checkpoint folder. export: the way back.

    import   header check -> side files, weights_layout.json -> state files, row by row -> checkpoint.json
    export   weights_layout.json -> weight files of full size -> each tensor to its place, row by row

No model is built: the name map says which state keys a model will ask for. Memory holds a few blocks of 8 MiB, whatever
the size of the model. Tensors keep their dtype if not told otherwise, files their order, so an imported checkpoint
exports to the files it came from, byte for byte.

Both run in one process or in several (`launched_ranks`), which share the files or tensors and write the same bytes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_v2pe.checkpoint.convert.exported import ExportedTensors
from megatron_v2pe.checkpoint.convert.import_plan import plan_import, unread_shards
from megatron_v2pe.checkpoint.files.block_stream import BlockStream
from megatron_v2pe.checkpoint.files.folder import (
    LAYOUT_FILE,
    CheckpointInfo,
    begin,
    commit,
    hf_path,
    read_info,
    read_layout,
    state_path,
    write_info,
    write_layout,
)
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.checkpoint.hf.config_json import update_dtype
from megatron_v2pe.checkpoint.hf.converted_blocks import (
    Dtype,
    Progress,
    converted_info,
    not_finite_message,
    silent,
)
from megatron_v2pe.checkpoint.hf.io import INDEX_FILE, HFWeights, index_text, plan_shards
from megatron_v2pe.checkpoint.hf.map import NameMap, family_name, name_map
from megatron_v2pe.checkpoint.state.dist_io import (
    gather_from_ranks,
    on_all_ranks,
    on_first_rank,
    process_group,
    raise_together,
    rank_and_world_size,
)
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.config.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

logger = logging.getLogger(__name__)


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
        force: replace `target` if it is there, once the new one is complete.
        dtype: cast floating point tensors.
        allow_pickle: take pickle files where there is no safetensors file.
        target_layout: parallel sizes for `CheckpointInfo.target_layout`; tensors are the same for every layout.
        progress: told the bytes of each block.
        expect: told all bytes of this rank beforehand.

    Raises:
        CheckpointError: everything that is wrong with the folder, in one message; or the target exists, or its
            disk is too small. Nothing is left behind.
    """
    weights, arch, names = open_hf(hf_folder, allow_pickle=allow_pickle)
    plan = plan_import(names.by_ours.values(), weights.tensors, dtype=dtype)
    kept = [_converted(without_dropped(file, names), dtype) for file in weights.files]
    not_finite: Counter[str] = Counter()
    with process_group(), _staged(target, force=force, needed_bytes=plan.num_bytes) as folder:
        on_first_rank(lambda: _begin_import(folder, weights, kept, dtype))
        mine = plan.share(*rank_and_world_size())
        expect(sum(shard.info.num_bytes for shard in mine))
        shards, unread = unread_shards(mine, weights, not_finite=not_finite, progress=progress)
        hashes = save_state(state_path(folder), shards, unread=unread, file_of=plan.file_of)
        _warn_of(not_finite, dtype)
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


def _begin_import(folder: Path, weights: HFWeights, kept: Sequence[WeightFile], dtype: Dtype) -> None:
    copy_side_files(weights.folder, hf_path(folder), weights.side_files())
    update_dtype(hf_path(folder) / "config.json", dtype)
    write_layout(hf_path(folder), kept)
    state_path(folder).mkdir()


def export_hf(
    checkpoint_folder: str | Path,
    target: str | Path,
    *,
    force: bool = False,
    dtype: Dtype = "keep",
    max_shard_bytes: int = 0,
    progress: Progress = silent,
    expect: Progress = silent,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder. Collective where there are several ranks.

    Args:
        checkpoint_folder: written by `import_hf` or by training; adapters are merged into their base.
        target: folder to create.
        force: replace `target` if it is there, once the new one is complete.
        dtype: cast floating point tensors.
        max_shard_bytes: largest weight file; 0 keeps the files of the imported folder.
        progress: told the bytes of each block.
        expect: told all bytes of this rank beforehand.

    Raises:
        CheckpointError: not a complete checkpoint, a tensor is missing, or the target cannot be written.
    """
    read_info(checkpoint_folder)
    hf = hf_path(checkpoint_folder)
    exported = ExportedTensors(checkpoint_folder, dtype=dtype, progress=progress)
    files = [exported.as_stored(file) for file in read_layout(hf)]
    if max_shard_bytes:
        everything = {name: tensor for file in files for name, tensor in file.tensors.items()}
        files = plan_shards(everything, max_shard_bytes=max_shard_bytes)
    needed_bytes = sum(file.num_bytes for file in files)
    with process_group(), _staged(target, force=force, needed_bytes=needed_bytes) as folder:
        on_first_rank(lambda: _begin_export(folder, hf, files, dtype))
        mine = _share(files, *rank_and_world_size())
        expect(sum(file.tensors[name].num_bytes for file, names in mine for name in names))
        on_all_ranks(lambda: _write_tensors(folder, mine, exported))
        _warn_of(exported.not_finite, dtype)


def _begin_export(folder: Path, hf: Path, files: Sequence[WeightFile], dtype: Dtype) -> None:
    """Everything but the tensors: side files, index, and weight files of their final size with a header."""
    side_files = [path for path in HFWeights(hf).side_files() if str(path) != LAYOUT_FILE]
    copy_side_files(hf, folder, side_files)
    update_dtype(folder / "config.json", dtype)
    _write_index(folder, files)
    for file in files:
        with (folder / file.name).open("wb") as stream:
            stream.write(file.header())
            stream.truncate(stream.tell() + file.num_bytes)


def _share(files: Sequence[WeightFile], rank: int, world_size: int) -> list[tuple[WeightFile, list[str]]]:
    """The tensors that a rank writes: an even stretch of all bytes, file by file."""
    total = sum(file.num_bytes for file in files)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    share, before = [], 0
    for file in files:
        starts = file.offsets()
        names = [name for name in file.tensors if first <= before + starts[name] < last]
        if names:
            share.append((file, names))
        before += file.num_bytes
    return share


def _write_tensors(
    folder: Path, share: Iterable[tuple[WeightFile, Iterable[str]]], exported: ExportedTensors
) -> None:
    with BlockStream() as stream:
        for file, names in share:
            stream.open(folder / file.name)
            data, starts = len(file.header()), file.offsets()
            for name in names:
                stream.position = data + starts[name]
                stream.put_blocks(exported.blocks(name))
            stream.close()


def open_hf(
    hf_folder: str | Path, *, allow_pickle: bool = False
) -> tuple[HFWeights, InternVLArchitecture, NameMap]:
    """Open a Hugging Face folder and check all of it: files, architecture, names, shapes.

    Raises:
        CheckpointError: one message with every problem found.
    """
    weights = HFWeights(hf_folder, allow_pickle=allow_pickle)
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


def _converted(file: WeightFile, dtype: Dtype) -> WeightFile:
    tensors = {name: converted_info(info, dtype) for name, info in file.tensors.items()}
    return WeightFile(file.name, tensors, file.metadata)


def _write_index(folder: Path, files: Sequence[WeightFile]) -> None:
    """Keep the index that came with the side files if it is true of `files`, else write or remove it."""
    path = folder / INDEX_FILE
    weight_map = {name: file.name for file in files for name in file.tensors}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["weight_map"] == weight_map:
        return
    path.unlink(missing_ok=True)
    if len(files) > 1:
        write_atomic(path, index_text(files))


@contextmanager
def _staged(target: str | Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """`folder.staged` for several ranks: the first one makes the folder, gives it its name, or removes it."""
    target = Path(target)
    tmp = on_first_rank(lambda: begin(target, force=force, needed_bytes=needed_bytes))
    is_first = rank_and_world_size()[0] == 0
    try:
        yield tmp
        on_first_rank(lambda: commit(tmp, target))
    except BaseException as error:
        if is_first:
            shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise


def _warn_of(not_finite: Counter[str], dtype: Dtype) -> None:
    """One warning for what all ranks found; float16 ends at 65504, so a cast to it may be the cause."""
    message = not_finite_message(sum(gather_from_ranks(not_finite), Counter()))
    if message and rank_and_world_size()[0] == 0:
        logger.warning("%s%s", message, " (after the cast to float16)" if dtype == "float16" else "")
