"""What the compiled functions of Transformer Engine that our layers need compute, by the plain formulas.

Each has the parameters it needs by their declared names. Attention supports packed tensors (thd) and tiles (sbhd).
Rows of a packed document b are cu_padded[b] .. cu_padded[b] + (cu[b+1] - cu[b]); the rows after them are padding,
which kernels leave alone.

Shape legend: t tokens, s and t tokens of a document, b tiles, h query heads, k key heads, g = h / k, d head dimension.
"""

import sys

import torch
import torch.nn.functional as F

CUDNN = 91900  # 9.19.0


def references():
    """Every function here by its name."""
    return {
        "get_cudnn_version": lambda: CUDNN,
        "get_fused_attn_backend": lambda **_: compiled().NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen,
        "fused_attn_fwd": fused_attn_fwd,
        "fused_attn_bwd": fused_attn_bwd,
        "thd_read_half_tensor": thd_read_half_tensor,
        "thd_second_half_lse_correction": thd_second_half_lse_correction,
        "thd_read_second_half_lse": thd_read_second_half_lse,
        "thd_out_correction": thd_out_correction,
        "thd_grad_correction": thd_grad_correction,
        "generic_gemm": generic_gemm,
        "rmsnorm_fwd": rmsnorm_fwd,
        "rmsnorm_bwd": rmsnorm_bwd,
        "layernorm_fwd": layernorm_fwd,
        "layernorm_bwd": layernorm_bwd,
    }


def compiled():
    return sys.modules["transformer_engine_torch"]


def is_packed(qkv_layout):
    name = qkv_layout.name
    assert name == "NVTE_THD_THD_THD" or "SB" in name, name
    return "THD" in name


def documents(x, cu, cu_padded, longest, packed):
    """Index of each document, or tile, in x."""
    if not packed:
        return [(slice(None), tile) for tile in range(x.shape[1])]
    lengths, starts = cu.diff().tolist(), cu_padded.tolist()
    assert max(lengths) <= longest, (
        f"a document of {max(lengths)} tokens, but the longest is said to be {longest}"
    )
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def pairs(named):
    """(index of queries, index of keys) of each document or tile, from the parameters of an attention function."""
    packed = is_packed(named["qkv_layout"])
    sides = [
        documents(
            named[x],
            named[f"cu_seqlens_{y}"],
            named[f"cu_seqlens_{y}_padded"],
            named[f"max_seqlen_{y}"],
            packed,
        )
        for x, y in (("Q", "q"), ("K", "kv"))
    ]
    return zip(*sides, strict=True)


def scores(q, k, scale, attn_mask_type):
    """[k, g, s, t] of one document, -inf where masked."""
    found = torch.einsum("skgd,tkd->kgst", q.unflatten(1, (k.shape[1], -1)), k) * scale
    name = attn_mask_type.name
    if name == "NVTE_PADDING_CAUSAL_MASK":
        assert len(q) == len(k), "how kernels align other shapes differs"
        return found.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), float("-inf"))
    assert name in ("NVTE_PADDING_MASK", "NVTE_NO_MASK"), name
    return found


def fused_attn_fwd(**named):
    assert named["p_dropout"] == 0
    q, k, v = named["Q"], named["K"], named["V"]
    packed = is_packed(named["qkv_layout"])
    out = torch.zeros(q.shape)
    lse = torch.full((*q.shape[:-1], 1), float("-inf"))  # [t, h, 1], or [s, b, h, 1] for now
    for mine, theirs in pairs(named):
        found = scores(q[mine], k[theirs], named["attn_scale"], named["attn_mask_type"])
        out[mine] = torch.einsum("kgst,tkd->skgd", found.softmax(-1), v[theirs]).flatten(1, 2)
        lse[mine] = found.logsumexp(-1).flatten(0, 1).T.unsqueeze(-1)
    return [out, lse if packed else lse.permute(1, 2, 0, 3), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(**named):
    q, k, v, lse = named["Q"], named["K"], named["V"], named["Aux_CTX_Tensors"][0]
    if not is_packed(named["qkv_layout"]):
        lse = lse.permute(2, 0, 1, 3)
    assert lse.shape == (*q.shape[:-1], 1)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    scale = named["attn_scale"]
    for mine, theirs in pairs(named):
        keys, per_group = k[theirs], (k.shape[-2], -1)
        queries, grad, out = (x[mine].unflatten(1, per_group) for x in (q, named["dO"], named["O"]))
        found = scores(q[mine], keys, scale, named["attn_mask_type"])
        total = lse[mine].squeeze(-1).unflatten(1, per_group).permute(1, 2, 0).unsqueeze(-1)
        weights = torch.exp(found - total).masked_fill(found == float("-inf"), 0.0)
        d_weights = torch.einsum("skgd,tkd->kgst", grad, v[theirs])
        d_scores = weights * (d_weights - (grad * out).sum(-1).permute(1, 2, 0).unsqueeze(-1)) * scale
        dq[mine] = torch.einsum("kgst,tkd->skgd", d_scores, keys).flatten(1, 2)
        dk[theirs] = torch.einsum("kgst,skgd->tkd", d_scores, queries)
        dv[theirs] = torch.einsum("kgst,skgd->tkd", weights, grad)
    return [dq, dk, dv, None, None]


def half_rows(cu_seqlens, half):
    """Rows of the first or second halves of all documents."""
    starts, stops = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    return torch.cat(
        [
            torch.arange(a + (b - a) // 2 * half, a + (b - a) // 2 * (half + 1))
            for a, b in zip(starts, stops, strict=True)
        ]
    )


def thd_read_half_tensor(*, tensor, cu_seqlens, half_idx):
    return tensor.index_select(tensor.dim() - 3, half_rows(cu_seqlens, half_idx))


def thd_second_half_lse_correction(*, lse, lse_per_step, cu_seqlens, lse_packed):
    assert lse_packed
    rows = half_rows(cu_seqlens, 1)  # lse [h, t]
    lse[:, rows] = torch.logaddexp(lse[:, rows], lse_per_step[:, : len(rows)])


def thd_read_second_half_lse(*, lse, cu_seqlens, lse_packed, second_half_lse_seqlen):
    assert lse_packed
    rows = half_rows(cu_seqlens, 1)
    found = lse.new_zeros(len(lse), second_half_lse_seqlen)
    found[:, : len(rows)] = lse[:, rows]
    return found


def thd_out_correction(*, out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed):
    assert lse_packed
    rows = half_rows(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    share = torch.exp(lse_per_step[:, : len(rows)] - lse[:, rows]).nan_to_num()  # of this step
    flat = out.view(-1, *out.shape[-2:])
    flat[rows] += out_per_step.view(-1, *out.shape[-2:])[: len(rows)] * share.T.unsqueeze(-1)


def thd_grad_correction(*, grad, grad_per_step, cu_seqlens, first_half, second_half):
    is_half = "none" in (first_half, second_half)
    for half, mode in enumerate((first_half, second_half)):
        if mode == "none":
            continue
        rows = half_rows(cu_seqlens, half)
        step = grad_per_step[: len(rows)] if is_half else grad_per_step[rows]
        grad[rows] = step if mode == "copy" else grad[rows] + step


def generic_gemm(*, A, transA, B, transB, D, bias, grad, accumulate, gelu, extra_output, **_):
    """op(B) op(A), which is what cuBLAS's column-major A B is for row-major tensors."""
    assert not gelu
    a, b = A.flatten(0, -2), B.flatten(0, -2)
    found = (b.T if transB else b) @ (a.T if transA else a)
    if bias is not None and not grad:
        found = found + bias
    if not transB:
        found = found.unflatten(0, B.shape[:-1])
    if D is not None:
        D.copy_(found.view(D.shape) + (D if accumulate else 0))
        found = D
    bias_grad = b.sum(0) if grad and bias is not None else None
    return found, bias_grad, None, extra_output


def rmsnorm_fwd(*, input, weight, eps, zero_centered_gamma, **_):
    assert not zero_centered_gamma
    inverse = (input.pow(2).mean(-1) + eps).rsqrt()
    return [input * inverse.unsqueeze(-1) * weight, None, inverse]


def rmsnorm_bwd(*, dz, x, rsigma, gamma, **_):
    # d(x * inverse * gamma): the inverse carries eps, so it is differentiated by hand.
    scaled, inverse = dz * gamma, rsigma.view(-1, 1)
    dx = scaled * inverse - x * inverse**3 * (scaled * x).mean(-1, keepdim=True)
    return [dx, (dz * x * inverse).sum(0)]


def layernorm_fwd(*, input, weight, bias, eps, zero_centered_gamma, **_):
    assert not zero_centered_gamma
    mean, inverse = input.mean(-1), (input.var(-1, unbiased=False) + eps).rsqrt()
    return [F.layer_norm(input, weight.shape, weight, bias, eps), mean, inverse]


def layernorm_bwd(*, dz, x, mu, rsigma, gamma, **_):
    scaled, inverse = dz * gamma, rsigma.view(-1, 1)
    normed = (x - mu.view(-1, 1)) * inverse
    dx = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
    return [dx * inverse, (dz * normed).sum(0), dz.sum(0)]
