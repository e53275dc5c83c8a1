"""A recomputed pyramid gives the gradients of one that keeps everything: in float64, to rounding of float64."""

import pytest
import torch

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.build import build_vision
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.batch.packed_batch import tile_shape
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown
from tests.support.piip import RECIPE

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
MODEL = {
    **PUBLISHED["2B"],
    "vision_config": {**PUBLISHED["2B"]["vision_config"], **SMALL, "image_size": 112},
    "force_image_size": 112,
    "piip_config": {
        **RECIPE,
        "branches": [
            {key: value for key, value in row.items() if key != "weights"} for row in RECIPE["branches"]
        ],
    },
}


def tower(dtype, **vision):
    arch = parse_architecture(MODEL)
    config = RunConfig(runtime=RuntimeConfig(dtype=dtype), vision=VisionConfig(**vision))
    context = init_distributed(resolve(ParallelConfig(), 1), seed=0)
    modules = choose_modules(ParallelConfig(attention_backend="native"), dtype="float32")
    built = build_vision(config, arch, modules, choose_elementwise(config.runtime), context)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return built.train(), arch


def gradients(dtype, **vision):
    """Gradients by name, of a weighted sum of the output."""
    built, arch = tower(dtype, **vision)
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(3, *tile_shape(arch.tile_sizes), generator=generator, dtype=torch.float64)
    hidden = built(wide.to(getattr(torch, dtype)))
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    (hidden * weights.to(hidden.dtype)).sum().backward()
    found = {name: parameter.grad for name, parameter in built.named_parameters()}
    shutdown()
    return found


def largest_error(wanted, found):
    """Over parameters: largest difference, relative to the largest gradient of the tower."""
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((found[name] - grad).abs().max()) for name, grad in wanted.items()) / scale


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_gradients_by_rounding_only(recompute):
    """1e-14 of the largest in float64, which leaves the order of sums as the only reason.

    What differs are gradients that are plain sums over rows (biases, LayerScale, gates): between recomputed layers a
    gradient lies in memory row by row, without recomputation it is the transposed view that the tower's output gives,
    and torch adds rows up in the order of memory. Gradients of matrix products are equal to the bit, and so is
    everything where layers are not recomputed whole.
    """
    kept = gradients("float64", recompute="none")
    assert all(grad is not None and grad.dtype == torch.float64 and grad.any() for grad in kept.values())
    again = gradients("float64", recompute=recompute)
    assert largest_error(kept, again) < 1e-14
    differ = [name for name in kept if not torch.equal(kept[name], again[name])]
    assert all(name.endswith((".bias", ".ls1", ".ls2", "_embedding", "_gamma")) for name in differ), differ
    assert (differ != []) == (recompute == "full")
