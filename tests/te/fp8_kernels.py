"""What Transformer Engine's compiled functions do with FP8 tensors, by the plain formulas, for a GPU of Hopper's kind.

An FP8 tensor has numbers by rows, for products that sum over its last dimension, and transposed ones, for products that
sum over its rows: Hopper multiplies in one order only, so each product must find the form that it needs.

    current     scale = largest number of the format / largest entry of the tensor
    blockwise   the same, a power of 2, for each 128 entries along the dimension that is summed over, or 128 x 128 of a
                weight

Shape legend: m rows, k channels.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.te import kernels

BLOCK = 128


def references():
    """Every function here by its name, beside those of `kernels`, one of which it replaces."""
    return {
        **kernels.references(),
        "quantize": quantize,
        "bgrad_quantize": bgrad_quantize,
        "fp8_transpose": fp8_transpose,
        "generic_gemm": generic_gemm,
        "get_cublasLt_version": lambda: 130000,
    }


def format_of(fp8_dtype):
    return torch.float8_e4m3fn if fp8_dtype.name == "kFloat8E4M3" else torch.float8_e5m2


def largest_of(fp8_dtype):
    return torch.finfo(format_of(fp8_dtype)).max


def to_fp8(x, scale, fp8_dtype):
    most = largest_of(fp8_dtype)
    return (x * scale).clamp(-most, most).to(format_of(fp8_dtype)).view(torch.uint8)


def from_fp8(data, fp8_dtype):
    return data.view(format_of(fp8_dtype)).float()


def is_blockwise(tensor_or_quantizer):
    return "Block" in type(tensor_or_quantizer).__name__


def quantize(*, tensor, quantizer, output, noop):
    assert noop is None
    out = (
        quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if output is None
        else output
    )
    x = tensor.detach().float().flatten(0, -2)
    (fill_blockwise if is_blockwise(quantizer) else fill_current)(x, quantizer, out)
    return storage(out) if quantizer.internal and output is None else out


def storage(tensor):
    """The same numbers without a torch tensor around them, which is what activations are."""
    bare = next(base for base in type(tensor).__mro__ if base.__name__.endswith("Storage"))
    return bare(**tensor.get_metadata())


def fill_current(x, quantizer, out):
    amax = x.abs().max()
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = largest_of(quantizer.dtype) / amax if amax > 0 else torch.ones(())
    out._scale_inv.fill_(1 / scale)
    data = to_fp8(x, scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.t().reshape(out._transpose.shape))
        out._transpose_invalid = False


def fill_blockwise(x, quantizer, out):
    assert quantizer.force_pow_2_scales
    assert not quantizer.all_gather_usage
    for data, scales, rows in (
        (out._rowwise_data, out._rowwise_scale_inv, x),
        (out._columnwise_data, out._columnwise_scale_inv, x.t()),
    ):
        if data is None:
            continue
        tall = BLOCK if quantizer.block_scaling_dim == 2 else 1
        amax = largest_in_blocks(rows, tall)
        exact = largest_of(quantizer.dtype) / amax.clamp_min(2.0**-100)
        scale = torch.exp2(torch.floor(torch.log2(exact)))
        data.copy_(to_fp8(rows, spread(scale, tall, rows.shape), quantizer.dtype).reshape(data.shape))
        inverse = 1 / scale if tall == BLOCK else (1 / scale).t()
        scales.zero_()
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse


def largest_in_blocks(x, tall):
    """Largest absolute entry of each block of `tall` x 128; [m / tall, k / 128]."""
    missing = (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % tall)
    blocks = F.pad(x.abs(), missing).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, tall))
    return blocks.amax((1, 3))


def spread(scale, tall, shape):
    """One scale for each block to one for each entry of a matrix of `shape`."""
    return scale.repeat_interleave(tall, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def bgrad_quantize(*, input, quantizer):
    return input.flatten(0, -2).sum(0), quantize(tensor=input, quantizer=quantizer, output=None, noop=None)


def fp8_transpose(*, input, dtype, out):
    found = input.flatten(0, -2).t().contiguous()
    return found if out is None else out.copy_(found.view(out.shape))


def is_fp8(x):
    return type(x).__name__.startswith("Float8")


def summed_over_channels(x):
    """[m, k] of an operand whose channels are summed over: from the numbers by rows."""
    if is_blockwise(x):
        return blockwise_numbers(x, x._rowwise_data, x._rowwise_scale_inv)
    assert x._data is not None
    return from_fp8(x._data, x._fp8_dtype).flatten(0, -2) * x._scale_inv


def summed_over_rows(x):
    """[m, k] of an operand whose rows are summed over: from the transposed numbers."""
    if is_blockwise(x):
        return blockwise_numbers(x, x._columnwise_data, x._columnwise_scale_inv).t()
    assert x._transpose is not None
    assert not x._transpose_invalid
    return (from_fp8(x._transpose, x._fp8_dtype).flatten(1) * x._scale_inv).t()


def blockwise_numbers(x, data, scales):
    numbers = from_fp8(data, x._fp8_dtype)
    numbers = numbers.flatten(1) if data is x._columnwise_data else numbers.flatten(0, -2)
    tall = BLOCK if x._is_2D_scaled else 1
    blocks = (-(-numbers.shape[0] // tall), -(-numbers.shape[1] // BLOCK))
    inverse = scales[: blocks[0], : blocks[1]] if tall == BLOCK else scales[: blocks[1], : blocks[0]].t()
    return numbers * spread(inverse, tall, numbers.shape)


def generic_gemm(*, A, transA, B, transB, **others):
    """Both operands in FP8, or neither; rows and channels by the rule that `config.fp8` enforces."""
    products = kernels.compiled().__dict__.setdefault("products", [])
    assert is_fp8(A) == is_fp8(B)
    products.append("fp8" if is_fp8(A) else "plain")
    if not is_fp8(A):
        return kernels.generic_gemm(A=A, transA=transA, B=B, transB=transB, **others)
    shape = tuple(B.size()) if not transB else None
    a = summed_over_channels(A) if transA else summed_over_rows(A)
    b = summed_over_rows(B) if transB else summed_over_channels(B)
    multiple = BLOCK if is_blockwise(A) else 16
    assert all(size % multiple == 0 for x in (a, b) for size in x.shape), (a.shape, b.shape)
    found, *rest = kernels.generic_gemm(A=a, transA=transA, B=b, transB=transB, **others)
    return (found.view(*shape[:-1], -1) if shape is not None and others["D"] is None else found), *rest
