"""Router of a mixture of experts: choice, both losses with their gradients, padding, capacity.

The reference is the formula of the class, differentiated by autograd in float64.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_v2pe.models.layers.experts import RoutedRows, RouterSettings

HIDDEN, NUM_EXPERTS, TOP_K = 16, 6, 2


def make_router(settings, *, sum_over_pack=None):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from megatron_v2pe.models.layers.experts import ExpertRouter

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        num_moe_experts=NUM_EXPERTS,
        moe_router_topk=TOP_K,
        moe_ffn_hidden_size=8,
        moe_router_load_balancing_type="none",
        add_bias_linear=False,
        perform_initialization=False,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
    )
    groups = ProcessGroupCollection(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    ports = {} if sum_over_pack is None else {"sum_over_pack": sum_over_pack}
    router = ExpertRouter(config=config, pg_collection=groups, settings=settings, **ports)
    generator = torch.Generator().manual_seed(5)
    router.weight.data = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator, dtype=torch.float64)
    return router.train()


def draw_rows(num_rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, 1, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)


def reference_losses(rows, weight, is_token):
    """aux and z of the kept rows, as the class's docstring has them."""
    logits = rows.reshape(-1, HIDDEN)[is_token] @ weight.t()
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K).indices, 1.0)
    aux = NUM_EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()
    return aux, logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("normalizes", [True, False])
def test_weights_are_those_of_the_chosen_experts(normalizes):
    router, rows = make_router(RouterSettings(normalizes_top_k=normalizes)), draw_rows(9)
    weights, choice = router(rows)
    probabilities = (rows.reshape(-1, HIDDEN) @ router.weight.t()).softmax(-1)
    best = probabilities.topk(TOP_K)
    wanted = best.values / best.values.sum(-1, keepdim=True) if normalizes else best.values
    assert torch.equal(choice.nonzero()[:, 1].reshape(-1, TOP_K), best.indices.sort().values)
    torch.testing.assert_close(weights.gather(1, best.indices), wanted)
    assert int((weights != 0).sum()) == 9 * TOP_K


@pytest.mark.parametrize("normalizes", [True, False])
def test_a_bias_changes_the_choice_and_no_weight(normalizes):
    """Expert 0 has the smallest logit and is chosen by its bias; its weight is what its logit gives."""
    router, rows = make_router(RouterSettings(normalizes_top_k=normalizes)), draw_rows(9)
    router.choice_bias = torch.zeros(NUM_EXPERTS)
    assert torch.equal(router(rows)[0], make_router(router.settings)(rows)[0])
    router.choice_bias[0] = 2.0  # more than any probability
    weights, choice = router(rows)
    probabilities = (rows.reshape(-1, HIDDEN) @ router.weight.t()).softmax(-1)
    assert bool(choice[:, 0].all())
    kept = probabilities * choice
    wanted = kept / kept.sum(-1, keepdim=True) if normalizes else kept
    torch.testing.assert_close(weights, wanted)


class _Layer:
    def __init__(self, number, router):
        self.layer_number, self.is_moe_layer = number, router is not None
        self.mlp = SimpleNamespace(router=router)


def test_biases_move_towards_even_use_and_come_back_from_json():
    from megatron_v2pe.assembly.optim.expert_bias import ExpertBias
    from megatron_v2pe.assembly.router_counts import RouterTotals

    def chunk_of(router):
        layers = [_Layer(1, None), _Layer(2, router)]
        return SimpleNamespace(language=SimpleNamespace(decoder=SimpleNamespace(layers=layers)))

    router, zeros = make_router(RouterSettings(normalizes_top_k=True)), torch.zeros(2)
    tokens = torch.tensor([[9.0, 1, 5, 5, 6, 4], [30, 0, 0, 0, 0, 0]])
    # Layer 3 lies on another pipeline stage: its bias is in the table, on every rank.
    totals = RouterTotals(layers=(1, 3), tokens=tokens, dropped=zeros, aux_loss=zeros, z_loss=zeros)
    bias = ExpertBias([chunk_of(router)], rate=0.25)
    assert bias.numbers() == {}
    bias.update(totals)
    assert router.choice_bias.tolist() == [-0.25, 0.25, 0, 0, -0.25, 0.25]
    bias.update(totals)
    assert bias.table() == {"1": [-0.5, 0.5, 0, 0, -0.5, 0.5], "3": [-0.5, 0.5, 0.5, 0.5, 0.5, 0.5]}
    assert bias.numbers() == {"expert_bias_max": 0.5}
    other = make_router(router.settings)
    again = ExpertBias([chunk_of(other)], rate=0.0)
    again.load(json.loads(json.dumps(bias.table())))
    assert torch.equal(other.choice_bias, router.choice_bias)
    again.update(totals)  # rate 0 keeps what a checkpoint brought
    assert again.table() == bias.table()


def test_losses_enter_the_gradient_by_the_packs_weight_and_without_padding():
    settings = RouterSettings(normalizes_top_k=True, aux_loss=0.7, z_loss=0.3, num_sparse_layers=4)
    router, rows = make_router(settings), draw_rows(10)
    is_token = torch.arange(10) < 7
    weight = torch.tensor(2.5, dtype=torch.float64)
    router.routed = RoutedRows(is_token=is_token, weight=weight)
    weights, _ = router(rows)
    (weights * 0).sum().backward()  # nothing but the losses
    found = router.weight.grad.clone(), rows.grad.clone()
    free = router.weight.detach().clone().requires_grad_(), rows.detach().clone().requires_grad_()
    aux, z = reference_losses(free[1], free[0], is_token)
    (weight / 4 * (0.7 * aux + 0.3 * z)).backward()
    torch.testing.assert_close(found[0], free[0].grad)
    torch.testing.assert_close(found[1], free[1].grad)
    assert float(found[1][7:].abs().max()) == 0
    assert float(router.counts.aux_loss) == pytest.approx(2.5 * float(aux))
    assert float(router.counts.z_loss) == pytest.approx(2.5 * float(z))
    assert int(router.counts.tokens.sum()) == 7 * TOP_K


def test_shares_of_two_ranks_add_up_to_the_whole_pack():
    """Each rank has half of the rows; the sum over the pack is what a collective would give."""
    settings = RouterSettings(normalizes_top_k=True, aux_loss=1.0, z_loss=1.0)
    rows, weight = draw_rows(12).detach(), torch.ones((), dtype=torch.float64)
    whole = make_router(settings)
    whole.routed = RoutedRows(is_token=torch.ones(12, dtype=torch.bool), weight=weight)
    weights, _ = whole(rows)
    (weights * 0).sum().backward()
    halves, sums = rows.chunk(2), []

    def keep(x):
        sums.append(x.clone())
        return x

    for half in halves:  # what each rank would bring
        router = make_router(settings, sum_over_pack=keep)
        router.routed = RoutedRows(is_token=torch.ones(6, dtype=torch.bool), weight=weight)
        router(half)
    total = sums[0] + sums[2]
    gradient = torch.zeros_like(whole.weight)
    for half in halves:
        answers = iter([total.clone(), torch.zeros(2, dtype=torch.float64)])
        router = make_router(settings, sum_over_pack=lambda _x, answers=answers: next(answers))
        router.routed = RoutedRows(is_token=torch.ones(6, dtype=torch.bool), weight=weight)
        weights, _ = router(half)
        (weights * 0).sum().backward()
        gradient += router.weight.grad
    torch.testing.assert_close(gradient, whole.weight.grad)


def test_capacity_drops_and_counts():
    settings = RouterSettings(normalizes_top_k=True, capacity_factor=0.5)
    router, rows = make_router(settings), draw_rows(24)
    router.routed = RoutedRows(
        is_token=torch.ones(24, dtype=torch.bool), weight=torch.ones((), dtype=torch.float64)
    )
    _, choice = router(rows)
    assert int(choice.sum(0).max()) <= 4  # 24 rows x 2 choices / 6 experts x 0.5
    assert int(router.counts.dropped) == 24 * TOP_K - int(choice.sum()) > 0


def test_nothing_is_counted_without_training():
    router, rows = make_router(RouterSettings(normalizes_top_k=True, aux_loss=1.0)), draw_rows(4)
    router.routed = RoutedRows(
        is_token=torch.ones(4, dtype=torch.bool), weight=torch.ones((), dtype=torch.float64)
    )
    with torch.no_grad():
        router(rows)
    router.eval()(rows)
    assert router.counts is None
