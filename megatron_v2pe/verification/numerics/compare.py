"""Our model against the reference, stage by stage: the table of `verify-numerics`.

    every rank   CapturedRun.outputs()                        ours, at any tp, pp, cp
    rank 0       ReferenceModel, float64, layer by layer      each stage compared when it is there
    every rank   the same rows

An error is the largest absolute deviation of a stage divided by the largest absolute value of that stage: single
entries near zero have no relative accuracy after a sum of thousands of terms.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.convert.exported_tensors import ConvertedTensors, ExportedTensors
from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.convert.other_format import OursInHF
from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_lora
from megatron_v2pe.checkpoint.files.folder import hf_path, is_complete, read_info
from megatron_v2pe.checkpoint.hf.name_map import other_names
from megatron_v2pe.checkpoint.state.ranks import on_first_rank
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.arch.native import github_config
from megatron_v2pe.config.pipeline import split_layers
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.config.validate import check_model_split, check_vision_split
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.parallel.topology import init_distributed
from megatron_v2pe.verification.numerics.captured import (
    DECODER_INPUT,
    DECODER_NORM,
    EMBEDDING,
    LOGITS,
    PROJECTOR,
    TOWER,
    CapturedRun,
    decoder_stage,
    stage_names,
    vision_stage,
)
from megatron_v2pe.verification.numerics.inputs import Inputs, make_inputs
from megatron_v2pe.verification.numerics.reference_model import ReadTensor, ReferenceModel, positions_of
from megatron_v2pe.verification.numerics.reference_pyramid import pyramid_features, pyramid_stages
from megatron_v2pe.verification.numerics.transformers_model import TransformersReference

TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-1}
"""Largest error that passes; docs/numerics.md says what was measured and what a mistake gives."""


@dataclass(frozen=True)
class StageRow:
    """One line of the table.

    Attributes:
        name: stage.
        largest: largest absolute value of the reference.
        error: largest absolute deviation.
        tolerance: of `relative`.
    """

    name: str
    largest: float
    error: float
    tolerance: float

    @property
    def relative(self) -> float:
        """`error` over `largest`; of an all-zero stage the error itself."""
        return self.error / self.largest if self.largest else self.error

    @property
    def passes(self) -> bool:
        """False beyond the tolerance, and for NaN."""
        return self.relative <= self.tolerance

    def cells(self) -> list[str]:
        """The row as text, in the columns of `format_rows`."""
        numbers = [f"{number:.3e}" for number in (self.largest, self.error, self.relative)]
        return [self.name, *numbers, f"{self.tolerance:.0e}", "pass" if self.passes else "FAIL"]


def compare_numerics(
    source: str | Path,
    checkpoint: str | Path,
    *,
    parallel: ParallelConfig,
    world_size: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    stride: int = 0,
    every: int = 0,
    reference: Literal["plain", "transformers"] = "plain",
) -> list[StageRow]:
    """Run one input through a reference made of `source` and through `checkpoint` in our model. Collective.

    Args:
        source: Hugging Face folder, or another checkpoint.
        checkpoint: checkpoint folder.
        parallel: layout of our model.
        world_size: ranks that were started.
        dtype: in which our model computes; the reference computes in float64.
        stride: see `make_inputs`.
        every: see `stage_names`.
        reference: `plain` PyTorch, or the same with `transformers`' decoder.

    Returns:
        A row for each stage, the same on every rank.

    Raises:
        ConfigError: the layout does not fit the ranks or the model, or the reference cannot be had.
        CheckpointError: one of the two folders cannot be read, or they are of models of other sizes.
    """
    read, config_folder = _open_source(source)
    reference_arch = read_architecture(config_folder)
    read_info(checkpoint)
    arch = read_architecture(hf_path(checkpoint))
    _check_layout(parallel, arch, world_size)
    _check_same_sizes(reference_arch, arch)
    if every < 0:
        raise ConfigError(
            f"--every is {every}, but must be at least 1, or 0 for about eight layers of each part"
        )
    inputs = make_inputs(arch, stride=stride)
    judge = _reference(reference, read, config_folder, is_v2pe=inputs.is_v2pe)
    layout = split_layers(arch.language.num_layers, num_stages=parallel.pp)
    config = RunConfig(
        parallel=ParallelConfig(**{**parallel.__dict__, "pipeline_layout": layout}),
        position=inputs.position_config,
        runtime=RuntimeConfig(dtype=dtype),
        lora=checkpoint_lora(checkpoint),
    )
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=0)
    wanted = stage_names(arch, every=every)
    run = CapturedRun(checkpoint, arch, config, context=context, inputs=inputs, wanted=wanted)
    ours = run.outputs()
    return on_first_rank(lambda: compare_stages(judge, inputs, ours, tolerance=TOLERANCES[dtype]))


def compare_stages(
    reference: ReferenceModel, inputs: Inputs, ours: dict[str, Tensor], *, tolerance: float
) -> list[StageRow]:
    """A row for each stage of `ours`; stages that only the reference has are skipped."""
    rows = []
    for name, wanted in reference_stages(reference, inputs):
        if name in ours:
            found = ours[name].double()
            if found.shape != wanted.shape:
                raise RuntimeError(f"{name}: ours is {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
            largest, error = float(wanted.abs().max()), float((found - wanted).abs().max())
            rows.append(StageRow(name, largest, error, tolerance))
    return rows


def reference_stages(reference: ReferenceModel, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Run the reference and yield each stage's name and tensor, in the shapes of `CapturedRun.outputs`."""
    arch = reference.arch
    with torch.no_grad():
        for name, hidden in _tower_stages(reference, inputs):  # the last one is the tower's output
            yield name, hidden
        read_features = (
            partial(pyramid_features, reference) if arch.reads_all_branches else reference.features
        )
        features = read_features(hidden)
        yield PROJECTOR, features
        slots = torch.from_numpy(inputs.is_visual.nonzero()[0])
        x = reference.embed(torch.from_numpy(inputs.tokens), features, slots)
        yield DECODER_INPUT, x
        states = reference.decoder_states(x, reference_positions(inputs), inputs.document_starts)
        for number, hidden in enumerate(states, 1):
            is_norm = number > arch.language.num_layers
            yield (DECODER_NORM if is_norm else decoder_stage(number)), hidden
        yield LOGITS, reference.logits(hidden[torch.from_numpy(~inputs.is_visual)])


def _tower_stages(reference: ReferenceModel, inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """Stages of the vision tower, with its pyramid where it has one."""
    if reference.arch.pyramid is not None:
        sizes = reference.arch.tile_sizes
        rows = inputs.pixels.split([3 * size**2 for size in sizes], dim=1)
        tiles = [part.unflatten(1, (3, size, size)) for part, size in zip(rows, sizes, strict=True)]
        yield from pyramid_stages(reference, tiles)
        return
    for number, hidden in enumerate(reference.vision_states(inputs.pixels)):
        yield (vision_stage(number) if number else EMBEDDING), hidden
    yield TOWER, hidden


def reference_positions(inputs: Inputs) -> Tensor:
    """Positions of the pack's tokens, float64 [t], walked token by token."""
    step = inputs.stride / inputs.tokens_per_tile
    starts, positions = inputs.document_starts, []
    for start, length in zip(starts, inputs.lengths, strict=False):
        visual = inputs.is_visual[start : start + length].tolist()
        positions += positions_of(visual, [step] * any(visual))
    return torch.tensor(positions, dtype=torch.float64)


def format_rows(rows: list[StageRow]) -> str:
    """The table; its last line says how many stages pass and which is worst."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.relative) else row.relative)
    passing = sum(row.passes for row in rows)
    last = (
        f"{passing} of {len(rows)} stages pass; largest relative error {worst.relative:.3e} at {worst.name}"
    )
    header = ["stage", "max abs", "error", "relative", "limit", ""]
    return "\n".join([*text_table(header, [row.cells() for row in rows], align="<>>>><"), last])


def to_json(rows: list[StageRow]) -> list[dict[str, Any]]:
    """The rows as json values."""
    return [{**dataclasses.asdict(row), "relative": row.relative, "passes": row.passes} for row in rows]


def _open_source(source: str | Path) -> tuple[ReadTensor, Path]:
    """Tensors of the reference by the names of the GitHub format, and the folder of its config.json."""
    if is_complete(source):
        read_info(source)
        is_native = read_architecture(hf_path(source)).folder_format == "hf-native"
        return ExportedTensors(source, in_other_format=is_native).read, hf_path(source)
    weights, arch, names = open_hf(source)
    if arch.folder_format == "hf-native":
        return ConvertedTensors(OursInHF(weights, names), other_names(arch)).read, Path(source)
    return weights.read, Path(source)


def _reference(kind: str, read: ReadTensor, folder: Path, *, is_v2pe: bool) -> ReferenceModel:
    arch = read_architecture(folder)
    is_v2pe = is_v2pe or arch.position_mode != "default"
    if kind == "plain":
        return ReferenceModel(arch, read, is_v2pe=is_v2pe)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if arch.folder_format == "hf-native":
        values = github_config(values, "config.json")
    return TransformersReference(arch, read, is_v2pe=is_v2pe, llm_config=values["llm_config"])


def _check_layout(parallel: ParallelConfig, arch: InternVLArchitecture, world_size: int) -> None:
    needed = parallel.tp * parallel.pp * parallel.cp
    if needed != world_size:
        launch = (
            f"torchrun --nproc-per-node {needed} -m megatron_v2pe verify-numerics ..."
            if needed > 1
            else "no torchrun"
        )
        raise ConfigError(
            f"verify-numerics: --tp {parallel.tp} --pp {parallel.pp} --cp {parallel.cp} is a layout for {needed} "
            f"ranks, but {world_size} were started; start it as: {launch}"
        )
    check_model_split(parallel, arch)
    check_vision_split(parallel, arch)


def _check_same_sizes(reference: InternVLArchitecture, ours: InternVLArchitecture) -> None:
    """Both must have the same tiles, vocabulary and layers; everything else may differ and shows as an error."""
    facts: dict[str, Callable[[InternVLArchitecture], int]] = {
        "tile size": lambda arch: arch.image_size,
        "tokens per tile": lambda arch: arch.tokens_per_tile,
        "vocabulary": lambda arch: arch.language.vocab_size,
        "vision layers": lambda arch: arch.vision.num_layers,
        "vision channels": lambda arch: arch.vision.hidden_size,
        "branches of a pyramid": lambda arch: len(arch.tile_sizes) - 1,
        "decoder layers": lambda arch: arch.language.num_layers,
        "decoder channels": lambda arch: arch.language.hidden_size,
    }
    for what, value in facts.items():
        if value(reference) != value(ours):
            raise ConfigError(
                f"verify-numerics: {what} is {value(reference)} in the source and {value(ours)} in the checkpoint; "
                "give the folder that the checkpoint was imported from"
            )
