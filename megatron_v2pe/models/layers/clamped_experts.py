"""Experts of GPT-OSS: biases, a clamped activation, and one tensor for all experts of a rank, as in the file.

    rows [r, H], sorted by expert --x W1[e] + b1[e]--> [r, 2I] --clamped_swiglu--> [r, I] --W2[e]--> [r, H] + b2[e]
    times the rows' weights

mcore's experts do not carry them: `GroupedMLP` has no biases, `SequentialMLP` adds the second bias once for each of
etp ranks' sums unless etp is 1, and both want gate above up where the file has them in alternating columns. A slice of
alternating columns holds both parts of its channels, so the tensors split over ranks as they are:

    gate_up_proj [E / ep, H, 2I / etp]    gate_up_proj_bias [E / ep, 2I / etp]
    down_proj    [E / ep, I / etp, H]     down_proj_bias    [E / ep, H]

Shape legend: r rows that this rank's experts got, E experts, H hidden, I channels of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

SIGMOID_GAIN = 1.702
"""Of the activation: x * sigmoid(1.702 x), which is near the GELU."""

_SPLIT = {"gate_up_proj": 2, "gate_up_proj_bias": 1, "down_proj": 1}
"""Parameter -> its dimension that lies on the etp ranks."""


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Columns g0 u0 g1 u1 ..., [r, 2I] to [r, I]: (u + 1) * g * sigmoid(1.702 g), in float32 or better.

    g is at most `limit`, u lies in -limit..limit.
    """
    working = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(working).unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return ((up + 1.0) * gate * torch.sigmoid(SIGMOID_GAIN * gate)).to(gate_up.dtype)


class _ClampedSwiglu(torch.autograd.Function):
    """`clamped_swiglu` that keeps its input alone, and computes what lies between again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        return clamped_swiglu(gate_up, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            gate_up = ctx.saved_tensors[0].detach().requires_grad_()
            output = clamped_swiglu(gate_up, ctx.limit)
        return torch.autograd.grad(output, gate_up, grads[0])[0], None


class _ShareOfBias(torch.autograd.Function):
    """One rank's share of a bias that is added to a sum over ranks; its gradient is the whole bias's.

    Each of the ranks has the gradient of the sum, so all copies of the bias get the same, whole gradient.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, num_ranks: int) -> Tensor:
        return bias / num_ranks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class ClampedExperts(MegatronModule):
    """This rank's experts of a layer. Arguments are those that mcore's MoELayer gives, and two of ours.

    Args:
        num_local_experts: experts of this rank.
        config: mcore's configuration of the decoder.
        pg_collection: groups of the decoder; ep, expt_tp and expt_dp are read.
        ffn_size: channels I of one expert, a multiple of etp.
        limit: of the clamp.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any,
        ffn_size: int,
        limit: float,
        **_of_other_versions: Any,
    ) -> None:
        super().__init__(config=config)
        self.limit = limit
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        hidden, channels = config.hidden_size, ffn_size // self.etp_group.size()
        shapes = {
            "gate_up_proj": (num_local_experts, hidden, 2 * channels),
            "gate_up_proj_bias": (num_local_experts, 2 * channels),
            "down_proj": (num_local_experts, channels, hidden),
            "down_proj_bias": (num_local_experts, hidden),
        }
        for name, shape in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            # Gradients are summed over the ranks that hold the same experts, which are fewer than all.
            parameter.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            # Gradient norms count what each tp rank holds, as experts of different ranks differ; copies of etp once.
            dim = _SPLIT.get(name, 0)
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            parameter.shared = name not in _SPLIT and self.etp_group.rank() > 0  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor, *_of_other_versions: Any
    ) -> tuple[Tensor, None]:
        """Rows [r, H] of the local experts, one after the other, and their weights [r] to [r, H]; no bias is left."""
        counts = tokens_per_expert.tolist()
        share = _ShareOfBias.apply(self.down_proj_bias, self.etp_group.size())
        # `unbind` once: picking experts one by one would make a gradient of the whole tensor for each.
        experts = zip(
            rows.split(counts),
            self.gate_up_proj.unbind(),
            self.gate_up_proj_bias.unbind(),
            self.down_proj.unbind(),
            share.unbind(),
            strict=True,
        )
        outputs = []
        for own, first, first_bias, second, second_bias in experts:
            inner = _ClampedSwiglu.apply(torch.addmm(first_bias, own, first), self.limit)
            outputs.append(torch.addmm(second_bias, inner, second))
        output = torch.cat(outputs)
        return (output * weights.unsqueeze(-1)).to(rows.dtype), None

    def backward_dw(self) -> None:
        """Nothing is delayed; mcore asks every kind of experts."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Shards of this rank: experts along dimension 0, channels along that of `_SPLIT`."""
        if sharded_offsets:
            raise ValueError("layers are saved under keys of their own, see SHARDED_STATE_METADATA")
        etp_rank = self.etp_group.rank()
        shards: dict[str, Any] = {}
        for name, parameter in self.state_dict(keep_vars=True).items():
            offsets = [(0, self.ep_group.rank(), self.ep_group.size())]
            if name in _SPLIT:
                offsets.append((_SPLIT[name], etp_rank, self.etp_group.size()))
            copy_number = 0 if name in _SPLIT else etp_rank
            shards[f"{prefix}{name}"] = ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *offsets,
                replica_id=(0, copy_number, self.dp_group.rank()),
            )
        return shards
