"""AdamW that keeps its step count in the parameter group, for hosts without Transformer Engine, apex, or a GPU.

megatron-core's distributed optimizer is written for their FusedAdam. With torch's AdamW in its place it
cannot resume: the step lives in the state of each parameter, it is looked for before the first update has
made it, and after a load all parameters share one step tensor, which every parameter's update then advances
once. The loss right after such a resume is still right; the one after that is wrong.

    m <- b1 m + (1-b1) g        v <- b2 v + (1-b2) g^2
    p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)        c = 1 - b^step
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam in torch's fused kernel (CPU and CUDA), with the state layout and arguments of apex's FusedAdam.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled (AdamW) with `adam_w_mode`, else added to the gradient.
        adam_w_mode: see `weight_decay`.
        bias_correction: divide the moments by 1 - beta^step.
        capturable: megatron-core from 0.17 on asks whether a CUDA graph may hold the step; it may not.
    """

    # torch's, without the decorator that keeps torch.compile away: it imports the compiler, a second of every start.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("this Adam counts its steps on the host, so a CUDA graph cannot hold it")
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction
        )
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:  # an empty group keeps no step, as apex has it
                group["step"] = group.get("step", 0) + 1
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        gradients: list[Tensor] = [weight.grad for weight in weights if weight.grad is not None]
        first, second = self._moments(weights)
        beta1, beta2 = group["betas"]
        # Without correction c is 1, as it is after infinitely many steps. All parameters read one count.
        step = float(group["step"]) if group["bias_correction"] else math.inf
        count = torch.full((), step, dtype=torch.float32, device=weights[0].device)
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        kernel(
            weights,
            gradients,
            first,
            second,
            [],
            [count] * len(weights),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _moments(self, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for weight in weights:
            state = self.state[weight]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(weight)
                state["exp_avg_sq"] = torch.zeros_like(weight)
        states = [self.state[weight] for weight in weights]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]


def install_fused_adam() -> bool:
    """Make megatron-core use `FusedAdam` where it chose torch's optimizers, or kernels of a GPU that is not there.

    mcore decides by what can be imported: in a container with Transformer Engine or apex it takes their FusedAdam on a
    host without a GPU, too, whose constructor already needs one. mcore then runs the branches that it runs with
    apex, in building, saving and loading alike; clipping uses mcore's own implementation on torch.

    Returns:
        Whether mcore uses it now; False where Transformer Engine's or apex's kernels can run.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    if not optimizer.USING_PYTORCH_OPTIMIZER and torch.cuda.is_available():
        return optimizer.Adam is FusedAdam
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    if not torch.cuda.is_available():
        clip_grads.multi_tensor_applier = local_multi_tensor_applier
        clip_grads.l2_norm_impl = local_multi_tensor_l2_norm
        clip_grads.multi_tensor_scale_impl = local_multi_tensor_scale
    return True
