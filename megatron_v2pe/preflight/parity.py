"""The run's attention on this device and over its context parallel ranks, against plain attention in float64.

Three documents of random queries, keys and values in the model's head counts go through the module that training
would use, at positions as the run has them: of its stride, up to its longest sample. Each rank compares its rows of
output and gradients with the formula, worked out on the host.

Shape legend: t tokens of the pack, l of this rank, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.mcore_config import DTYPES, language_config, rope_spec
from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
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


def check_attention(config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> Finding:
    """Largest error of output, dq, dk, dv on this rank. Collective over its context parallel group."""
    plan, ranks = context.plan, context.ranks
    unit = plan.pad_to_multiple * max(1, TOKENS // (sum(SHARES) * plan.pad_to_multiple))
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
    ours = _ours(
        [x[index].to(ranks.device) for x in whole],
        _packed(boundaries, shards, units[index], spec, rope_length=length, device=ranks.device),
        config=config,
        arch=arch,
        context=context,
    )
    angles = rope_angles(units, spec, rope_length=length)
    scale = spec.scaling.attention_factor
    wanted = reference(*(x.double() for x in whole), lengths=lengths, angles=angles, scale=scale)
    pairs = [(mine.cpu().double(), full[index]) for mine, full in zip(ours, wanted, strict=True)]
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return judge_error(error, dtype, plan, positions=length)


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


def _ours(
    local: list[Tensor],
    params: V2PEPackedSeqParams,
    *,
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
) -> list[Tensor]:
    """Output [l, h, d], dq, dk, dv of the module that training would use."""
    query, key, value = (x.requires_grad_() for x in local[:3])
    attention = choose_modules(
        config.parallel, dtype=config.runtime.dtype, fp8=config.model.fp8
    ).language_attention(
        config=language_config(config, arch, context.plan),
        layer_number=1,
        attn_mask_type=AttnMaskType.padding_causal,
        attention_type="self",
        cp_comm_type=config.parallel.cp_comm_type,
        pg_collection=context.ranks.groups,
    )
    out = attention(
        query, key, value, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=params
    )
    grads = torch.autograd.grad(out, (query, key, value), local[3].flatten(1))
    return [out.detach().view_as(query), *grads]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    *,
    lengths: list[int],
    angles: Tensor,
    scale: float = 1.0,
) -> list[Tensor]:
    """Output, dq, dk, dv of softmax(R(q) R(k)^T / sqrt(d)) v inside each document, causal; float64.

    R turns a token by its `angles`, float32 [t, d/2], and stretches it by `scale`.
    """
    leaves = [x.requires_grad_() for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    queries, turned = (apply_rotary(x, angles.double(), scale=scale) for x in leaves[:2])
    keys, values = (x.repeat_interleave(groups, 1) for x in (turned, leaves[2]))  # [t, k, d] -> [t, h, d]
    document = torch.repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    scores = torch.einsum("shd,thd->hst", queries, keys) * query.shape[-1] ** -0.5
    out = torch.einsum("hst,thd->shd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
