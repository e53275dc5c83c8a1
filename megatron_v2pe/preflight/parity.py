"""The run's attention on this device and over its context parallel ranks, against plain attention in float64.

Three documents of random queries, keys and values in the model's head counts go through the module that training
would use, at positions as the run has them: of its stride, up to its longest sample. Each rank compares its rows of
output and gradients with the formula, worked out on the host. A decoder whose layers see windows of different sizes is
looked at once for each size; sinks are random.

Shape legend: t tokens of the pack, l of this rank, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.mcore_config import DTYPES, language_config, rope_spec
from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.attention.windows import layer_window
from megatron_v2pe.parallel.shards import ZIGZAG, Shards, held_by
from megatron_v2pe.parallel.topology import ParallelContext, ParallelPlan
from megatron_v2pe.parallel.zigzag import range_indices
from megatron_v2pe.preflight.findings import Finding
from megatron_v2pe.v2pe.rope import RopeSpec, apply_rotary, rope_angles

TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
}  # of each result's norm; a wrong row costs 0.1 and more
SHARES = (1, 3, 2)  # lengths of the documents, in units
TOKENS = 192  # about; more where many ranks share a document
WINDOWS = 3  # at least, in all documents together: then the longest is longer than a window


def check_attention(config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> Finding:
    """Largest error of output, dq, dk, dv on this rank. Collective over its context parallel group."""
    plan, ranks = context.plan, context.ranks
    decoder = language_config(config, arch, plan)
    layers = {layer_window(decoder, 1 + layer): 1 + layer for layer in reversed(range(decoder.num_layers))}
    tokens = max(TOKENS, *(WINDOWS * (window or 0) for window in layers))
    unit = plan.pad_to_multiple * max(1, tokens // (sum(SHARES) * plan.pad_to_multiple))
    lengths = [share * unit for share in SHARES]
    dtype = DTYPES[config.runtime.dtype]
    heads = (arch.language.num_heads // plan.tp, max(1, arch.language.num_kv_heads // plan.tp))
    whole = _inputs(sum(lengths), heads, arch.language.head_dim, dtype)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    spec = rope_spec(config, arch)
    units = random_position_units(lengths, spec, longest=config.data.max_sample_tokens)
    length = int(units.max()) // spec.tokens_per_tile + 1
    shards = _shards(boundaries, config, plan)
    index = torch.from_numpy(range_indices(shards.ranges[ranks.cp_rank]))
    params = _packed(boundaries, shards, units[index], spec, rope_length=length, device=ranks.device)
    formula = Formula(
        lengths=lengths,
        angles=rope_angles(units, spec, rope_length=length),
        scale=spec.scaling.attention_factor,
        sink=_sink(heads[0], dtype) if decoder.softmax_type == "learnable" else None,
    )
    errors = []
    for window, layer in layers.items():
        attention = _attention(config, decoder, context, layer)
        if formula.sink is not None:
            attention.load_state_dict({"softmax_offset": formula.sink})
        ours = _ours(attention, [x[index].to(ranks.device) for x in whole], params)
        wanted = reference(*(x.double() for x in whole), formula=replace(formula, window=window))
        pairs = [(mine.cpu().double(), full[index]) for mine, full in zip(ours, wanted, strict=True)]
        errors += [float((a - b).norm() / b.norm()) for a, b in pairs]
    return judge_error(max(errors, key=_nan_first), dtype, plan, positions=length)


def _nan_first(error: float) -> float:
    return float("inf") if error != error else error


def _shards(boundaries: np.ndarray, config: RunConfig, plan: ParallelPlan) -> Shards:
    """The documents over all ranks; where the run's may lie on some, over one, all and half of them."""
    if config.parallel.cp_sharding == "zigzag":
        return ZIGZAG.shards(boundaries, cp=plan.cp)
    every = tuple(range(plan.cp))
    divisors = [count for count in range(1, plan.cp) if plan.cp % count == 0]
    return held_by(boundaries, ((0,), every, every[: max(divisors)]), cp=plan.cp)


def random_position_units(lengths: list[int], spec: RopeSpec, *, longest: int) -> Tensor:
    """Positions [t] of documents, int64 counts of 1/tokens_per_tile: each starts at 0 and ends near `longest`.

    Uneven steps, of whole positions where the run's rotary module has no others.
    """
    generator = torch.Generator().manual_seed(1)
    smallest = 1 if spec.fractional else spec.tokens_per_tile
    documents = []
    for tokens in lengths:
        steps = torch.rand(tokens, generator=generator, dtype=torch.float64)
        steps[0] = 0.0
        whole = steps.cumsum(0) / steps.sum().clamp(min=1e-9) * (longest * spec.tokens_per_tile / smallest)
        documents.append(whole.long() * smallest)
    return torch.cat(documents)


def judge_error(error: float, dtype: torch.dtype, plan: ParallelPlan, *, positions: int) -> Finding:
    """Finding of the largest relative error; NaN is a no-go too."""
    is_right = error <= TOLERANCE[dtype]
    where = f"cp {plan.cp}, {str(dtype).removeprefix('torch.')}, {positions} positions"
    text = f"{where}: off by {error:.1e} of float64, {TOLERANCE[dtype]:.0e} allowed"
    if not is_right:
        text += "; do not train; try parallel.attention_backend=native or another parallel.cp_comm_type"
    return Finding(name="attention", verdict="go" if is_right else "no-go", text=text)


def _inputs(tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and gradient of the output, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(tokens, count, head_dim, generator=generator).to(dtype) for count in counts]


def _packed(
    boundaries: np.ndarray,
    shards: Shards,
    units: Tensor,
    spec: RopeSpec,
    *,
    rope_length: int,
    device: torch.device,
) -> V2PEPackedSeqParams:
    """What the attention core is given: boundaries of the documents, this rank's positions."""
    cut = torch.from_numpy(boundaries).to(device=device, dtype=torch.int32)
    longest = int(np.diff(boundaries).max())
    return V2PEPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cut,
        cu_seqlens_kv=cut,
        cu_seqlens_q_padded=cut,
        cu_seqlens_kv_padded=cut,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rotary_angles=rope_angles(units.to(device), spec, rope_length=rope_length),
        document_lengths=shards.lengths,
        document_holders=shards.holders,
        rotary_scale=spec.scaling.attention_factor,
        round_rotary=spec.precision == "reference",
    )


def _sink(heads: int, dtype: torch.dtype) -> Tensor:
    """[h], the same on all ranks."""
    return torch.randn(heads, generator=torch.Generator().manual_seed(2)).to(dtype)


def _attention(
    config: RunConfig, decoder: TransformerConfig, context: ParallelContext, layer: int
) -> torch.nn.Module:
    """The module that training would use in this layer of the decoder, 1-based."""
    modules = choose_modules(
        config.parallel,
        dtype=config.runtime.dtype,
        fp8=config.model.fp8,
        sinks=decoder.softmax_type == "learnable",
    )
    attention = modules.language_attention(
        config=decoder,
        layer_number=layer,
        attn_mask_type=AttnMaskType.padding_causal,
        attention_type="self",
        cp_comm_type=config.parallel.cp_comm_type,
        pg_collection=context.ranks.groups,
    )
    return attention.to(context.ranks.device)


def _ours(attention: torch.nn.Module, local: list[Tensor], params: V2PEPackedSeqParams) -> list[Tensor]:
    """Output [l, h, d], dq, dk, dv of a module."""
    query, key, value = (x.requires_grad_() for x in local[:3])
    out = attention(
        query, key, value, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=params
    )
    grads = torch.autograd.grad(out, (query, key, value), local[3].flatten(1))
    return [out.detach().view_as(query), *grads]


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What the scores and weights of a layer are.

    Attributes:
        lengths: tokens of each document.
        angles: float32 [t, d/2], by which tokens are turned.
        scale: by which they are stretched.
        window: newest tokens of its document that a query sees, itself included; None for all.
        sink: [h], a logit that joins the softmax and has no value; None for none.
    """

    lengths: list[int]
    angles: Tensor
    scale: float = 1.0
    window: int | None = None
    sink: Tensor | None = None

    def mask(self) -> Tensor:
        """[t, t], whether a query sees a key."""
        document = torch.repeat_interleave(torch.tensor(self.lengths))
        age = torch.arange(len(document))[:, None] - torch.arange(len(document))
        seen = (document[:, None] == document) & (age >= 0)
        return seen if self.window is None else seen & (age < self.window)


def reference(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *, formula: Formula) -> list[Tensor]:
    """Output, dq, dk, dv of softmax(R(q) R(k)^T / sqrt(d)) v inside each document, causal; float64.

    R turns a token by its angles and stretches it by the scale.
    """
    leaves = [x.requires_grad_() for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    queries, turned = (apply_rotary(x, formula.angles.double(), scale=formula.scale) for x in leaves[:2])
    keys, values = (x.repeat_interleave(groups, 1) for x in (turned, leaves[2]))  # [t, k, d] -> [t, h, d]
    scores = torch.einsum("shd,thd->hst", queries, keys) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~formula.mask(), -torch.inf)
    if formula.sink is not None:
        extra = formula.sink.double()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, extra], dim=-1)
    out = torch.einsum("hst,thd->shd", scores.softmax(-1)[..., : len(query)], values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
