"""Adapters of one linear, on one rank: what they add, where, and what they leave alone."""

import pytest
import torch

from megatron_v2pe.config.lora import is_adapter_parameter
from megatron_v2pe.models.layers.lora import FusedAdapters, FusedPart, LinearAdapters

# Two kv groups of two queries, heads of 3 channels: rows q q k v | q q k v.
QKV = tuple(FusedPart(name=name, share=share) for name, share in (("q", 2), ("k", 1), ("v", 1)))
GATE_UP = (FusedPart(name="gate"), FusedPart(name="up"))


def adapters(parts, adapted, *, rows, group_rows=0, dropout=0.0):
    spec = LinearAdapters(
        parts=parts,
        adapted=adapted,
        rank=2,
        scale=0.5,
        dropout=dropout,
        is_row=False,
        group_rows=group_rows,
    )
    generator = torch.Generator().manual_seed(0)
    made = FusedAdapters(spec, torch.empty(rows, 5))
    for parameter in made.parameters():
        parameter.data.normal_(generator=generator)
    return made


def product(made, name):
    """scale * B A of one adapter, [rows, in], by loops over nothing but itself."""
    a, b = made[name].lora_A, made[name].lora_B.reshape(-1, 2)
    return 0.5 * b @ a


def test_grouped_rows_get_the_products_of_their_own_part():
    made, x = adapters(QKV, ("q", "v"), rows=24, group_rows=12), torch.randn(7, 1, 5)
    q, v, nothing = product(made, "q"), product(made, "v"), torch.zeros(3, 5)
    fused = torch.cat([q[:6], nothing, v[:3], q[6:], nothing, v[3:]])
    torch.testing.assert_close(made(x), x @ fused.T, rtol=1e-5, atol=1e-6)


def test_stacked_rows_need_no_groups():
    made, x = adapters(GATE_UP, ("gate", "up"), rows=8), torch.randn(4, 2, 5)
    fused = torch.cat([product(made, "gate"), product(made, "up")])
    torch.testing.assert_close(made(x), x @ fused.T, rtol=1e-5, atol=1e-6)


def test_blocks_share_one_a():
    """Phi-3's gate_up_proj: one adapter in Hugging Face, two blocks of rows on each rank."""
    made, x = adapters((FusedPart(name="gate_up", blocks=2),), ("gate_up",), rows=8), torch.randn(3, 5)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "gate_up.lora_A": (2, 5),
        "gate_up.lora_B": (2, 4, 2),
    }
    torch.testing.assert_close(made(x), x @ product(made, "gate_up").T, rtol=1e-5, atol=1e-6)


def test_dropout_is_for_training_alone():
    made, x = adapters(GATE_UP, ("gate",), rows=8, dropout=0.5), torch.randn(50, 5)
    plain = made.eval()(x)
    assert torch.equal(made(x), plain)
    dropped = made.train()(x)
    assert not torch.equal(dropped, plain)
    assert not dropped[:, 4:].any()  # "up" has no adapter


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language.decoder.layers.0.mlp.linear_fc1.lora.w1.lora_A", True),
        ("language.decoder.layers.0.mlp.linear_fc1.weight", False),
    ],
)
def test_adapters_are_known_by_name(name, expected):
    assert is_adapter_parameter(name) is expected
