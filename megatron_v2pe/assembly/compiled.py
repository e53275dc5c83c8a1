"""Whether element-wise operations are compiled (`runtime.elementwise`), after a trial on this rank's device.

    eager, or auto on a CPU    operation by operation
    auto on a GPU              compiled; where the trial fails, one by one after a warning with the reason
    compiled                   a trial that fails is an error

The trial compiles the rotation, runs it forward, and compares it with what it was compiled from. Every rank of a host
has the same compiler, so ranks agree without asking; where they do not, their results differ in rounding only.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial

import torch
from megatron.core.fusions import fused_bias_swiglu

from megatron_v2pe.config.schema import ModelConfig, RuntimeConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.layers.elementwise import ElementwiseOps
from megatron_v2pe.v2pe.rope import rotary_tables, rotated

logger = logging.getLogger(__name__)

_SWIGLU = ("swiglu", "swiglu_back")  # of mcore, which decorates them with torch.compile where there is a GPU
_compile = partial(torch.compile, dynamic=True)  # numbers of tokens and tiles change with every micro batch


def choose_elementwise(runtime: RuntimeConfig) -> ElementwiseOps:
    """The operations for `runtime.elementwise`; without compiling, mcore's SwiGLU is not compiled either.

    Raises:
        ConfigError: `compiled`, and compiling fails here.
    """
    on_gpu = torch.cuda.is_available()
    if runtime.elementwise == "eager" or (runtime.elementwise == "auto" and not on_gpu):
        _leave_swiglu_uncompiled()
        return ElementwiseOps()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    reason = trial(device)
    if not reason:
        return compiled_ops()
    if runtime.elementwise == "compiled":
        raise ConfigError(
            f"runtime.elementwise is 'compiled', but torch.compile cannot run here: {reason}; install "
            "what it needs (a C++ compiler, on a GPU also triton), or set runtime.elementwise to auto or eager"
        )
    logger.warning(
        "torch.compile cannot run here (%s): element-wise operations run one by one, a few percent slower",
        reason,
    )
    _leave_swiglu_uncompiled()
    return ElementwiseOps()


@lru_cache(maxsize=1)
def compiled_ops() -> ElementwiseOps:
    """All of them compiled; nothing is compiled before the first call of each."""
    eager = ElementwiseOps()
    return ElementwiseOps(**{name: _compile(getattr(eager, name)) for name in vars(eager)})


@lru_cache(maxsize=2)
def trial(device: torch.device) -> str:
    """Why torch.compile cannot run on a device, "" where it can."""
    angles = torch.arange(8, dtype=torch.float32, device=device).view(4, 2)
    x = torch.arange(32, dtype=torch.float32, device=device).view(4, 2, 4)
    try:
        tables = rotary_tables(angles, x.dtype)
        off = float((compiled_ops().rotated(x, *tables) - rotated(x, *tables)).abs().max())
    except Exception as error:  # whatever a compiler, a driver or a full disk raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    return "" if off < 1e-4 else f"a compiled rotation is wrong by {off:.1e}"


def fuses_swiglu(model: ModelConfig) -> bool:
    """Whether MLPs keep only their first linear's output; see `model.swiglu`."""
    return model.swiglu == "fused" or (model.swiglu == "auto" and torch.cuda.is_available())


def _leave_swiglu_uncompiled() -> None:
    """Put the functions that mcore's decorator has compiled back in their places."""
    for name in _SWIGLU:
        function = getattr(fused_bias_swiglu, name)
        setattr(fused_bias_swiglu, name, getattr(function, "_torchdynamo_orig_callable", function))
