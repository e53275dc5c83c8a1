"""Experts of GPT-OSS: the activation with its gradients, biases that etp ranks add once, shards, a router's bias.

The reference is the formula of docs, written out for each expert in float64.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_v2pe.models.layers.experts import RouterSettings
from tests.unit.models.test_experts import HIDDEN, NUM_EXPERTS, TOP_K, draw_rows, make_router

EXPERTS, FFN, LIMIT = 3, 4, 1.5
COUNTS = [5, 0, 2]  # an expert may get no row


def group(size=1, rank=0):
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def make_experts(*, etp=1, etp_rank=0, ep=1, ep_rank=0):
    from megatron.core.transformer import TransformerConfig

    from megatron_v2pe.models.layers.clamped_experts import ClampedExperts

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, params_dtype=torch.float64,
        expert_model_parallel_size=ep, num_moe_experts=EXPERTS * ep, use_cpu_initialization=True,
        moe_ffn_hidden_size=FFN, add_bias_linear=False, moe_router_load_balancing_type="none",
    )  # fmt: skip
    groups = SimpleNamespace(ep=group(ep, ep_rank), expt_tp=group(etp, etp_rank), expt_dp=group())
    return ClampedExperts(EXPERTS, config, pg_collection=groups, ffn_size=FFN, limit=LIMIT)


def drawn(experts):
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return experts


def by_formula(experts, rows, weights):
    outputs = []
    for e, own in enumerate(rows.split(COUNTS)):
        both = own @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate = torch.where(both[:, 0::2] > LIMIT, torch.full_like(both[:, 0::2], LIMIT), both[:, 0::2])
        up = both[:, 1::2].clamp(-LIMIT, LIMIT)
        inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        outputs.append(inner @ experts.down_proj[e] + experts.down_proj_bias[e])
    return torch.cat(outputs) * weights[:, None]


def inputs():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(sum(COUNTS), HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(sum(COUNTS), generator=generator, dtype=torch.float64, requires_grad=True)
    return rows, weights


def gradients(output, experts, rows, weights):
    probe = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape)
    names, parameters = zip(*experts.named_parameters(), strict=True)
    found = torch.autograd.grad((output * probe).sum(), [*parameters, rows, weights])
    return dict(zip([*names, "rows", "weights"], found, strict=True))


def test_output_and_gradients_are_those_of_the_formula():
    experts = drawn(make_experts())
    rows, weights = inputs()
    output, bias = experts(rows, torch.tensor(COUNTS), weights)
    assert bias is None
    wanted = by_formula(experts, rows, weights)
    torch.testing.assert_close(output, wanted)
    ours, reference = (gradients(each, experts, rows, weights) for each in (output, wanted))
    assert set(ours) == set(reference)
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
    assert (reference["gate_up_proj"] == 0).any()  # some are clamped
    assert (ours["down_proj_bias"][1] == 0).all()  # no row went there


def test_ranks_that_share_an_expert_add_up_to_it():
    """Alternating columns are cut in the middle; the second bias counts once, and each copy has its whole gradient."""
    whole = drawn(make_experts())
    rows, weights = inputs()
    wanted = by_formula(whole, rows, weights)
    reference = gradients(wanted, whole, rows, weights)
    outputs, found = [], []
    for rank in range(2):
        part = make_experts(etp=2, etp_rank=rank)
        part.gate_up_proj.data = whole.gate_up_proj.data.chunk(2, dim=2)[rank].clone()
        part.gate_up_proj_bias.data = whole.gate_up_proj_bias.data.chunk(2, dim=1)[rank].clone()
        part.down_proj.data = whole.down_proj.data.chunk(2, dim=1)[rank].clone()
        part.down_proj_bias.data = whole.down_proj_bias.data.clone()
        output, _ = part(rows, torch.tensor(COUNTS), weights)
        outputs.append(output)
        found.append(gradients(output, part, rows, weights))
    torch.testing.assert_close(sum(outputs), wanted)
    for name, dim in (("gate_up_proj", 2), ("gate_up_proj_bias", 1), ("down_proj", 1)):
        torch.testing.assert_close(torch.cat([each[name] for each in found], dim=dim), reference[name])
    for each in found:
        torch.testing.assert_close(each["down_proj_bias"], reference["down_proj_bias"])
    for name in ("rows", "weights"):
        torch.testing.assert_close(found[0][name] + found[1][name], reference[name])


def test_shards_name_their_place_among_experts_and_channels():
    shards = make_experts(etp=2, etp_rank=1, ep=2, ep_rank=1).sharded_state_dict("mlp.experts.")
    places = {
        name.removeprefix("mlp.experts."): (shard.global_shape, shard.global_offset, shard.replica_id)
        for name, shard in shards.items()
    }
    assert places == {
        "gate_up_proj": ((6, HIDDEN, 8), (3, 0, 4), (0, 0, 0)),
        "gate_up_proj_bias": ((6, 8), (3, 4), (0, 0, 0)),
        "down_proj": ((6, 4, HIDDEN), (3, 2, 0), (0, 0, 0)),
        "down_proj_bias": ((6, HIDDEN), (3, 0), (0, 1, 0)),  # a copy
    }


def test_half_precision_computes_the_activation_in_float32():
    from megatron_v2pe.models.layers.clamped_experts import clamped_swiglu

    x = torch.linspace(-3, 3, 64).bfloat16()
    exact = clamped_swiglu(x.double(), LIMIT)
    assert clamped_swiglu(x, LIMIT).dtype == torch.bfloat16
    assert torch.equal(clamped_swiglu(x, LIMIT), exact.bfloat16())


def test_a_routers_bias_takes_part_in_choice_weights_and_losses():
    router, rows = make_router(RouterSettings(normalizes_top_k=True, has_bias=True)), draw_rows(9)
    assert not make_router(RouterSettings(normalizes_top_k=True)).bias
    router.bias.data = torch.linspace(-2.0, 2.0, NUM_EXPERTS, dtype=torch.float64)
    weights, choice = router(rows)
    logits = rows.reshape(-1, HIDDEN) @ router.weight.t() + router.bias
    best = logits.topk(TOP_K)
    assert torch.equal(choice.nonzero()[:, 1].reshape(-1, TOP_K), best.indices.sort().values)
    torch.testing.assert_close(weights.gather(1, best.indices), best.values.softmax(-1))
    weights.square().sum().backward()
    assert router.bias.grad.abs().sum() > 0
    assert router.bias.sequence_parallel is False


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_gradients_of_spread_experts_are_not_summed_over_all_ranks(name):
    assert getattr(make_experts(), name).allreduce
    assert not getattr(make_experts(ep=2), name).allreduce
    # Each tp rank counts its experts in the gradient norm; of copies on etp ranks the first one.
    counted = [getattr(make_experts(etp=2, etp_rank=rank), name) for rank in (0, 1)]
    assert all(parameter.tensor_model_parallel for parameter in counted)
    assert [parameter.shared for parameter in counted] == [False, name == "down_proj_bias"]
