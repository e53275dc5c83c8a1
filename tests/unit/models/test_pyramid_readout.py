"""LLaVA's readout of a pyramid: with zero gates it reads untouched towers; recomputation and slices change nothing."""

from dataclasses import replace

import pytest
import torch

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.build import build_projector, build_vision
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.batch.packed_batch import tile_shape
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.models.memory import recomputed
from megatron_v2pe.models.vision import InternViT
from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown
from tests.unit.models.test_pyramid_tower import MODEL, largest_error

HIDDEN = 64


def parts(dtype, *, norm="gn", grid=5, **vision):
    """Tower and readout with random weights."""
    arch = parse_architecture(
        {
            **MODEL,
            "llm_config": {**MODEL["llm_config"], "hidden_size": HIDDEN},
            "piip_config": {
                **MODEL["piip_config"],
                "readout": "llava",
                "readout_norm": norm,
                "readout_grid": grid,
            },
        }
    )
    config = RunConfig(runtime=RuntimeConfig(dtype=dtype), vision=VisionConfig(**vision))
    context = init_distributed(resolve(ParallelConfig(), 1), seed=0)
    modules = choose_modules(ParallelConfig(attention_backend="native"), dtype="float32")
    tower = build_vision(config, arch, modules, choose_elementwise(config.runtime), context).train()
    readout = build_projector(config, arch, modules, choose_elementwise(config.runtime), context).train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in (tower, readout):
            for parameter in part.parameters():
                wide = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(wide)
    return tower, readout, arch


def pixels_of(arch, dtype):
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(3, *tile_shape(arch.tile_sizes), generator=generator, dtype=torch.float64)
    return wide.to(getattr(torch, dtype))


def close_gates(tower):
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("_gamma"):
                parameter.zero_()


def named(tower, readout):
    return {
        **{f"vision.{name}": p for name, p in tower.named_parameters()},
        **{f"projector.{name}": p for name, p in readout.named_parameters()},
    }


def weighted(features):
    """A loss with another weight for each feature."""
    return (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gates_read_each_tower_as_it_is_alone(dtype):
    """Features and shared gradients equal to the bit; every gate gets a gradient, nothing else of an interaction."""
    tower, readout, arch = parts(dtype)
    close_gates(tower)
    pixels = pixels_of(arch, dtype)
    tiles = tower.split_sizes(pixels)

    def alone():
        towers = [tower, *tower.branches]
        states = [InternViT.forward(each, tile)[:, 1:] for each, tile in zip(towers, tiles, strict=True)]
        return readout(torch.cat([state.flatten(1) for state in states], dim=1))

    found = []
    for forward in (lambda: readout(tower(pixels)), alone):
        for parameter in named(tower, readout).values():
            parameter.grad = None
        features = forward()
        assert features.dtype == getattr(torch, dtype)
        assert features.shape == (3, 25, HIDDEN)
        weighted(features.float()).backward()
        grads = {name: p.grad for name, p in named(tower, readout).items()}
        found.append((features.detach(), grads))
    shutdown()
    (pyramid, pyramid_grads), (plain, plain_grads) = found
    assert torch.equal(pyramid, plain)
    shared = [name for name in pyramid_grads if "interactions." not in name]
    assert [name for name in shared if not torch.equal(pyramid_grads[name], plain_grads[name])] == []
    new = {name: grad for name, grad in pyramid_grads.items() if "interactions." in name}
    moved = {name for name, grad in new.items() if grad is not None and grad.any()}
    assert moved == {name for name in new if name.endswith("_gamma")}


def gradients(dtype, **settings):
    tower, readout, arch = parts(dtype, **settings)
    weighted(readout(tower(pixels_of(arch, dtype)))).backward()
    found = {name: parameter.grad for name, parameter in named(tower, readout).items()}
    shutdown()
    return found


@pytest.mark.parametrize("norm", ["gn", "ln"])
def test_recomputation_changes_gradients_by_rounding_only(norm):
    """1e-14 of the largest in float64; every parameter of every part gets a gradient."""
    kept = gradients("float64", norm=norm, recompute="none")
    assert all(grad is not None and grad.any() for grad in kept.values())
    again = gradients("float64", norm=norm, recompute="full")
    assert largest_error(kept, again) < 1e-14


def test_tiles_do_not_see_each_other():
    """GroupNorm is over one tile: slices of tiles, and a recomputed readout, give the same features to the bit."""
    tower, readout, arch = parts("float32")
    pixels = pixels_of(arch, "float32")
    with torch.no_grad():
        rows = tower(pixels)
        whole = readout(rows)
        apart = torch.cat([readout(tower(tile)) for tile in pixels.split(1)])
    torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-5)  # matrix products of other sizes
    kept = rows.clone().requires_grad_(True)
    assert torch.equal(recomputed(readout, kept), whole)
    shutdown()


def test_the_finest_grid_is_the_default():
    arch = parse_architecture({**MODEL, "piip_config": {**MODEL["piip_config"], "readout": "llava"}})
    assert arch.tokens_per_tile == 14 * 14
    assert replace(arch, pyramid=None).tokens_per_tile == 16
