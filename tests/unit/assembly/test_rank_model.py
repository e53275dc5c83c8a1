"""What a rank of any layout holds, from one process."""

import json
from pathlib import Path

import pytest
import torch

from megatron_v2pe.assembly.rank_model import build_rank_bytes, rank_model
from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.fake_world import fake_world
from megatron_v2pe.parallel.plan import ParallelPlan, padded_vocab_size, resolve

CKPT = Path(__file__).parents[2] / "golden" / "ckpt"


def shapes(arch, *, rank=0, **layout):
    """Name in the whole model -> shape and dtype of every parameter that the rank holds."""
    config = RunConfig(parallel=ParallelConfig(**layout))
    plan = resolve(config.parallel, config.parallel.tp * config.parallel.pp * config.parallel.cp)
    with rank_model(config, arch, plan=plan, rank=rank) as (model_chunks, _):
        return {
            whole_name(model_chunk, name): (tuple(parameter.shape), parameter.dtype)
            for model_chunk in model_chunks
            for name, parameter in model_chunk.named_parameters()
        }


def whole_name(model_chunk, name):
    """Decoder layers are numbered over all stages."""
    prefix = "language.decoder.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{model_chunk.language.decoder.layers[int(number)].layer_number - 1}.{rest}"


@pytest.mark.parametrize("key", ["a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m"])
def test_one_rank_holds_the_table(key):
    arch = parse_architecture(json.loads((CKPT / key / "config.json").read_text()))
    found = shapes(arch)
    names = name_map(arch)
    assert set(found) == set(names.by_ours)
    padded_rows = padded_vocab_size(arch.language.vocab_size, 1) - arch.language.vocab_size
    padding = 2 * padded_rows * arch.language.hidden_size
    assert sum(torch.Size(shape).numel() for shape, _ in found.values()) == names.num_parameters + padding
    assert {dtype for _, dtype in found.values()} == {torch.bfloat16}


def test_76b_at_tp8_pp4_cp8():
    """By hand: Llama-3 70B has 64 heads in 8 groups of 128 channels, 28672 MLP channels, 20 layers a stage."""
    arch = parse_architecture(PUBLISHED["76B"])
    layout = dict(tp=8, pp=4, cp=8)
    first = shapes(arch, rank=0, **layout)
    assert first["language.decoder.layers.19.self_attention.linear_qkv.weight"][0] == (1280, 8192)
    assert first["language.embedding.word_embeddings.weight"][0] == (16064, 8192)  # 128512 / 8
    assert first["vision.encoder.layers.44.mlp.linear_fc1.weight"][0] == (12800, 3200)  # whole on each rank
    last = shapes(arch, rank=255, **layout)
    assert last["language.decoder.layers.60.mlp.linear_fc1.weight"][0] == (7168, 8192)  # gate and up
    assert last["language.output_layer.weight"][0] == (16064, 8192)
    layers = {name.split(".")[3] for name in last if name.startswith("language.decoder.layers.")}
    assert layers == {str(number) for number in range(60, 80)}
    assert not [name for name in last if name.startswith(("vision", "projector"))]
    split = shapes(arch, rank=0, vision="tensor", **layout)
    assert split["vision.encoder.layers.0.self_attention.linear_qkv.weight"][0] == (
        3 * 4 * 128,
        3200,
    )  # 32 heads


def test_bytes_of_training():
    """bfloat16: 2 bytes a weight, 4 a gradient, and 12 a weight of Adam's shard, up to the buffers' padding."""
    arch = parse_architecture(PUBLISHED["2B"])
    config = RunConfig(parallel=ParallelConfig(tp=2))
    whole = build_rank_bytes(config, arch, plan=resolve(config.parallel, 2), rank=0)
    numbers = sum(torch.Size(shape).numel() for shape, _ in shapes(arch, tp=2).values())
    assert whole.parameters == 2 * numbers
    assert whole.gradients == pytest.approx(4 * numbers, rel=1e-3)
    assert whole.optimizer == pytest.approx(12 * numbers, rel=1e-3)
    shared = build_rank_bytes(config, arch, plan=resolve(config.parallel, 8), rank=0)
    assert (shared.parameters, shared.gradients) == (
        whole.parameters,
        pytest.approx(whole.gradients, rel=1e-3),
    )
    assert shared.optimizer == pytest.approx(whole.optimizer / 4, rel=0.1)
    float32 = RunConfig(parallel=ParallelConfig(tp=2), runtime=RuntimeConfig(dtype="float32"))
    exact = build_rank_bytes(float32, arch, plan=resolve(float32.parallel, 2), rank=0)
    assert exact.parameters == 4 * numbers
    assert exact.optimizer == pytest.approx(8 * numbers, rel=1e-3)


def test_frozen_parts_have_no_optimizer_state():
    from megatron_v2pe.config.schema import VisionConfig

    arch = parse_architecture(PUBLISHED["2B"])
    all_trained, frozen = (RunConfig(vision=VisionConfig(freeze=freeze)) for freeze in (False, True))
    plan = ParallelPlan()
    saved = build_rank_bytes(all_trained, arch, plan=plan, rank=0)
    kept = build_rank_bytes(frozen, arch, plan=plan, rank=0)
    assert saved.optimizer - kept.optimizer == 12 * 304_012_288


def test_a_layout_that_does_not_fit():
    with pytest.raises(
        ConfigError, match=r"parallel\.pp x parallel\.vpp is 5 x 1 = 5, but must divide the 24"
    ):
        shapes(parse_architecture(PUBLISHED["2B"]), pp=5)


def test_a_rank_that_is_not_there():
    with pytest.raises(ValueError, match="rank 2 of a plan for 2"), fake_world(ParallelPlan(tp=2), rank=2):
        pass


def test_the_generator_and_the_world_are_left_as_they_were():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shapes(parse_architecture(PUBLISHED["1B"]), tp=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()
