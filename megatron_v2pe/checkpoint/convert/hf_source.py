"""A Hugging Face folder as the source of weights: opened, checked against its config.json, side files copied."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.checkpoint.files.weights_layout import LAYOUT_FILE, write_layout
from megatron_v2pe.checkpoint.hf.foreign_names import foreign_names, mixed_formats
from megatron_v2pe.checkpoint.hf.name_map import NameMap, name_map
from megatron_v2pe.checkpoint.hf.tables import spelling_of
from megatron_v2pe.checkpoint.hf.weight_files import outside_or_odd, require_inside, side_files
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.arch.families.rules import EMBEDDING
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.text.agreement import chosen_template, require_rows
from megatron_v2pe.data.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
_HEADS = ("lm_head.weight", "output.weight")
_ODD_WEIGHTS = 3  # tensors of whole numbers that are each named; more are another kind of folder
_COMPARED_BYTES = 64 * 2**20


def open_hf(
    hf_folder: str | Path, *, allow_pickle: bool = False
) -> tuple[HFWeights, InternVLArchitecture, NameMap]:
    """Open a Hugging Face folder and check all of it: files, architecture, names, shapes.

    Raises:
        CheckpointError: one message with every problem found.
    """
    weights = HFWeights(hf_folder, allow_pickle=allow_pickle)
    problems = [*weights.problems, *outside_or_odd(Path(hf_folder)), *_adapters_beside(Path(hf_folder))]
    names = None
    try:
        arch = read_architecture(hf_folder)
        spelling = spelling_of(arch, weights.tensors)
        names = name_map(arch, spelling)
    except CheckpointError as error:
        problems.append(str(error))
    if names is not None and weights.files:
        foreign = mixed_formats(weights.tensors, names.by_hf, arch, spelling) or foreign_names(
            weights.tensors, names.by_hf
        )
        raise_problems(f"{hf_folder}: cannot be imported", [foreign] if foreign else [])
        whole = [name for name in names.by_hf if name in weights.tensors and _is_whole(weights.tensors[name])]
        if len(whole) > _ODD_WEIGHTS:
            problems.append(
                f"{len(whole)} of {len(weights.tensors)} tensors hold whole numbers ({whole[0]}, ...), as quantised "
                "weights do; import the folder that was quantised, in its own dtype"
            )
            raise_problems(f"{hf_folder}: cannot be imported", problems)
        problems += _unknown_or_misshapen(weights.tensors, names)
        if not weights.problems:  # else a missing file has been reported, not each of its tensors
            problems += [f"{name}: missing" for name in names.by_hf if name not in weights.tensors]
        problems += _mixed_dtypes(weights.tensors, names)
    if names is not None and not problems:
        problems += _lost_heads(weights, names, is_tied=arch.language.tie_word_embeddings)
    raise_problems(f"{hf_folder}: cannot be imported", problems)
    assert names is not None
    return weights, arch, names


def _is_whole(info: TensorInfo) -> bool:
    return not info.dtype.is_floating_point


def _adapters_beside(folder: Path) -> Iterator[str]:
    """Adapters that nobody would apply."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file() and (folder / "config.json").is_file():
            yield (
                f"{name}: adapters beside whole weights, which would be left out; merge them (merge_and_unload() of "
                "PEFT), import them from a folder of their own with --base, or move the file away"
            )


def _unknown_or_misshapen(tensors: Mapping[str, TensorInfo], names: NameMap) -> Iterator[str]:
    for name, info in tensors.items():
        entry = names.by_hf.get(name)
        if entry is None and not names.drop_reason(name):
            yield f"{name}: this architecture has no such tensor"
        elif entry is not None and not info.dtype.is_floating_point:
            yield f"{name}: has dtype {str(info.dtype).removeprefix('torch.')}, but weights are floating point numbers"
        elif entry is not None and info.shape != names.hf_shape(name):
            yield f"{name}: has shape {info.shape}, config.json makes it {names.hf_shape(name)}"


def _lost_heads(weights: HFWeights, names: NameMap, *, is_tied: bool) -> Iterator[str]:
    """A head that would be left out because it is the embedding, and is not."""
    if not is_tied:
        return
    (embedding,) = names.by_ours[EMBEDDING].hf
    for name, info in weights.tensors.items():
        if name in names.by_hf or not name.endswith(_HEADS):
            continue
        is_same = info == weights.tensors[embedding] and all(
            torch.equal(weights.read_box(name, rows), weights.read_box(embedding, rows))
            for rows in _row_blocks(info)
        )
        if not is_same:
            yield (
                f"{name}: differs from {embedding}, but config.json says that they are one (tie_word_embeddings is "
                "true), so it would be lost; set tie_word_embeddings of llm_config to false to keep this head, or take "
                "the tensor out of the folder"
            )


def _row_blocks(info: TensorInfo) -> Iterator[tuple[slice, ...]]:
    step = max(1, _COMPARED_BYTES // max(1, info.row_bytes))
    yield from ((slice(start, start + step),) for start in range(0, info.num_rows, step))


def check_tokenizer(hf_folder: str | Path, arch: InternVLArchitecture) -> None:
    """Read the tokenizer of a folder and compare it with the embedding; the template may still be named by a run.

    Raises:
        CheckpointError: the tokenizer cannot be read, or has ids without a row.
    """
    tokenizer = load_tokenizer(hf_folder)
    num_rows = arch.language.vocab_size
    require_rows(tokenizer, num_rows=num_rows, folder=hf_folder, image_token_id=arch.image_token_id)
    try:
        chosen_template("", arch.template, tokenizer=tokenizer, folder=hf_folder)
    except CheckpointError as error:
        logger.warning("%s; training with data.template works, generate and evaluate will not", error)


def _mixed_dtypes(tensors: Mapping[str, TensorInfo], names: NameMap) -> Iterator[str]:
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
        require_inside(source, path)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def copy_hf_folder(source: Path, target: Path) -> None:
    """Make a checkpoint's `hf/`: from that of another, or from a Hugging Face folder without its weights."""
    if (source / LAYOUT_FILE).is_file():
        raise_problems(f"{source}: cannot be copied", outside_or_odd(source))
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        return
    weights, _, names = open_hf(source)
    target.mkdir()
    copy_side_files(source, target, side_files(source))
    write_layout(target, [without_dropped(file, names) for file in weights.files])
