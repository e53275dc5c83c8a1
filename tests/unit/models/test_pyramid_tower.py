"""A tower with a pyramid: gradients with and without recomputation in float64; zero gates in float32 and bfloat16."""

from dataclasses import replace

import pytest
import torch

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.build import build_vision
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.batch.packed_batch import tile_shape
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.models.piip.interaction import _drop_tiles
from megatron_v2pe.models.vision import InternViT
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


def tower(dtype, *, drop_path=0.0, **vision):
    arch = parse_architecture(MODEL)
    arch = replace(arch, pyramid=replace(arch.pyramid, drop_path=drop_path))
    config = RunConfig(runtime=RuntimeConfig(dtype=dtype), vision=VisionConfig(**vision))
    context = init_distributed(resolve(ParallelConfig(), 1), seed=0)
    modules = choose_modules(ParallelConfig(attention_backend="native"), dtype="float32")
    built = build_vision(config, arch, modules, choose_elementwise(config.runtime), context)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return built.train(), arch


def gradients(dtype, *, seed=0, **settings):
    """Gradients by name, of a weighted sum of the output; `seed` of drop path."""
    built, arch = tower(dtype, **settings)
    torch.manual_seed(seed)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gates_are_the_plain_tower_in_either_dtype(dtype):
    """Output and shared gradients equal to the bit; only gates into the large branch get gradients."""
    built, arch = tower(dtype)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("_gamma"):
                parameter.zero_()
    pixels = torch.randn(3, *tile_shape(arch.tile_sizes), generator=torch.Generator().manual_seed(6))
    pixels = pixels.to(getattr(torch, dtype))
    shared = {
        name: p for name, p in built.named_parameters() if not name.startswith(("branches", "interactions"))
    }
    found, new = [], {}
    for forward in (lambda: built(pixels), lambda: InternViT.forward(built, built.split_sizes(pixels)[0])):
        built.zero_grad()
        hidden = forward()
        assert hidden.dtype == getattr(torch, dtype)
        (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append((hidden, {name: parameter.grad.clone() for name, parameter in shared.items()}))
        new = new or {name: p.grad for name, p in built.named_parameters() if name not in shared}
    (pyramid, pyramid_grads), (plain, plain_grads) = found
    shutdown()
    assert torch.equal(pyramid, plain)
    assert [name for name in shared if not torch.equal(pyramid_grads[name], plain_grads[name])] == []
    moved = {name for name, grad in new.items() if grad is not None and grad.any()}
    assert moved == {name for name in new if "12.branch2to1_injector.c" in name and name.endswith("_gamma")}


def test_drop_path_drops_whole_tiles_and_is_repeated_in_backward():
    """Other draws give other gradients; recomputation draws what forward drew; in eval nothing is dropped."""
    dropped, again, other = (
        gradients("float64", drop_path=0.5, seed=seed, recompute=recompute)
        for seed, recompute in ((1, "none"), (1, "full"), (2, "none"))
    )
    assert largest_error(dropped, again) < 1e-14
    assert largest_error(dropped, other) > 1e-3
    x = torch.ones(400, 3, 2, dtype=torch.float64)
    kept = _drop_tiles(x, 0.25)
    per_tile = kept.flatten(1)
    assert ((per_tile == 0).all(1) | (per_tile == 1 / 0.75).all(1)).all()
    assert 0.65 < float((per_tile[:, 0] > 0).double().mean()) < 0.85
    built, arch = tower("float32", drop_path=0.9)
    whole, _ = tower("float32")
    pixels = torch.randn(2, *tile_shape(arch.tile_sizes), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        assert torch.equal(built.eval()(pixels), whole.eval()(pixels))
    shutdown()
