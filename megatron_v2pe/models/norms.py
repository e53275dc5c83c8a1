"""RMSNorm and LayerNorm that mcore's layer specs accept and that allow sequence parallelism.

mcore's own torch norm refuses sequence parallelism. These carry the mark `sequence_parallel` on their
parameters, by which mcore sums their gradients over the tensor parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class Norm(torch.nn.Module):
    """Normalises the last dimension; the kind is `config.normalization`.

    RMSNorm normalises in float32, casts to the input's dtype and multiplies by the weight after, as the
    release does (reference: InternLM2RMSNorm); the order matters in bf16.

    Args:
        config: mcore's configuration (normalization, params_dtype, sequence_parallel).
        hidden_size: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused_by_local_norms: Any
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.is_rms = config.normalization == "RMSNorm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if not self.is_rms:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        if not self.is_rms:
            return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)
        working = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(working, (self.hidden_size,), None, self.eps).to(x.dtype) * self.weight
