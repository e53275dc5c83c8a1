"""Gradients of every parameter, as whole Hugging Face tensors, against the golden norms and slices.

Gradients are written through the same sharded state as weights and read back whole, so the comparison covers
the placement of every shard as well as its value.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.checkpoint.state.model_state import model_sharded_state_dict
from megatron_v2pe.checkpoint.state.ranks import on_first_rank
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.verification.golden.cases import Case
from megatron_v2pe.verification.golden.rows import Row, compared

GRADIENT_FLOOR = 1e-4  # relative to the parameter's largest gradient


def gradient_rows(name: str, case: Case, gradients: dict[str, Tensor], *, prefix: str = "") -> Iterator[Row]:
    """Compare gradients with those of a case.

    Args:
        name: of the rows.
        case: what was run.
        gradients: from `whole_gradients`.
        prefix: of the recorded quantities; `aux_` for the gradients of the load balancing loss.

    Yields:
        `grad_l2`: worst relative deviation of a parameter's gradient norm. `grad`: worst deviation inside
        the stored slices, relative to the parameter's largest gradient. The worst parameter is named.
    """
    wanted = case.values[f"{prefix}grad_l2"]
    tolerance = case.tolerance(f"{prefix}grad_max_rel_to_param_absmax", floor=GRADIENT_FLOOR)
    norms = {key: _norm_error(gradients[key], norm) for key, norm in wanted.items()}
    yield _worst(name, f"{prefix}grad_l2", norms, tolerance)
    rows_of = case.values.get(f"{prefix}grad_rows") or dict.fromkeys(case.names(f"{prefix}grad/"), "all")
    slices = {
        key: _slice_error(gradients[key], key, rows, case.wanted(f"{prefix}grad/{key}"), wanted[key])
        for key, rows in rows_of.items()
    }
    if slices:
        yield _worst(name, f"{prefix}grad", slices, tolerance)


def _worst(name: str, quantity: str, errors: dict[str, float], tolerance: float) -> Row:
    key = max(errors, key=lambda parameter: (errors[parameter] != errors[parameter], errors[parameter]))
    return compared(name, quantity, error=errors[key], tolerance=tolerance, detail=f"worst in {key}")


def _norm_error(gradient: Tensor, wanted: float) -> float:
    """Relative deviation; absolute where the wanted norm is zero (parts that saw no image)."""
    error = abs(float(gradient.double().norm()) - wanted)
    return error / wanted if wanted > 0 else error


def _slice_error(
    gradient: Tensor, key: str, rows: list[int] | str, wanted: Tensor, wanted_l2: float
) -> float:
    if not isinstance(rows, str):  # "all" is the whole tensor
        is_positions = key.endswith("position_embedding")
        gradient = gradient[0][rows] if is_positions else gradient[rows]
    error = float((gradient.reshape(wanted.shape) - wanted).abs().max())
    # The largest gradient of the parameter is at most its norm; both bounds hold for a right gradient.
    scale = min(float(gradient.abs().max()), wanted_l2)
    scale = max(scale, float(wanted.abs().max()))
    return error / scale if scale > 0 else error


def whole_gradients(
    model_chunks: list[InternVL], *, arch: InternVLArchitecture, ranks: Ranks
) -> dict[str, Tensor]:
    """Gradients of all parameters in the buffers, by Hugging Face name, on every rank. Collective."""
    weights = [parameter.data for model_chunk in model_chunks for parameter in model_chunk.parameters()]
    for model_chunk in model_chunks:
        for parameter in model_chunk.parameters():
            parameter.data = parameter.main_grad.detach().clone()  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(on_first_rank(lambda: scratch)) / "gradients"
        on_first_rank(folder.mkdir)
        save_state(folder, model_sharded_state_dict(model_chunks, ranks))
        reader = StateReader(folder)
        gradients: dict[str, Tensor] = {}
        for entry in name_map(arch).by_ours.values():
            gradients.update(zip(entry.hf, entry.to_hf(reader.read(entry.ours)), strict=True))
        on_first_rank(lambda: None)
    parameters = (parameter for model_chunk in model_chunks for parameter in model_chunk.parameters())
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return gradients
