"""Real megatron-core on a host without CUDA, by one import hook.

    import megatron_v2pe    hook registered, nothing imported
    import megatron.core    first import: is CUDA there?
                              yes -> the hook removes itself, nothing changes
                              no  -> every megatron.core module sees a proxy `torch`
    megatron.core           torch.cuda.current_device()  ->  proxy  ->  torch.device("cpu")
    user code               torch.cuda.is_available()    ->  torch  ->  False, as before

megatron-core asks for CUDA in three ways: functions of `torch.cuda`, the literal device "cuda", and the
methods `Tensor.type()` and `Tensor.cuda()`. The first two are answered by the proxy; the methods belong to a
class that everybody shares, so their replacements check the calling module and act for megatron.core only.
A `TorchFunctionMode` would do the same without the hook, but it costs 2.6 us per operator instead of 1.3 and
would change what user code sees too.

Standard library only at the top of this file: the package imports it before anything else.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MCORE = "megatron.core"

device: str = "cpu"
"""What megatron-core gets when it asks for its CUDA device. "meta" builds a model without memory."""

_FACTORIES = (
    *("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
)

_finder: _McoreFinder | None = None
_proxy: types.ModuleType | None = None


def install() -> None:
    """Register the hook, and patch the megatron-core modules that are loaded already. Safe to call twice.

    Functions of modules loaded earlier keep the fuser they were decorated with (torch.compile), so import
    this package first where there is no C++ compiler.
    """
    global _finder
    if _finder is not None:
        return
    _finder = _McoreFinder()
    loaded = [module for name, module in list(sys.modules.items()) if _is_mcore(name)]
    if loaded and not _activate():
        return
    for module in loaded:
        _patch_module(module)
    sys.meta_path.insert(0, _finder)


def is_active() -> bool:
    """True once megatron-core runs on the proxy, that is after its first import on a host without CUDA."""
    return _proxy is not None


def _is_mcore(name: str) -> bool:
    return name == MCORE or name.startswith(MCORE + ".")


def _activate() -> bool:
    """Build the proxy and patch the two tensor methods, unless CUDA is available. Returns whether it did."""
    global _proxy
    if _proxy is not None:
        return True
    import torch

    if torch.cuda.is_available():
        return False
    _proxy = _build_proxy()
    _patch_tensor_methods()
    return True


class _McoreFinder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules by the other finders and patches them after they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_mcore(fullname):
            return None
        if not _activate():
            sys.meta_path.remove(self)
            return None
        spec = self._spec_of_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _PatchingLoader(importlib.abc.Loader):
    """Runs a module by its own loader, then replaces its global `torch`; all else is left to the own loader."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._inner.exec_module(module)
        _patch_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _patch_module(module: types.ModuleType) -> None:
    import torch

    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _proxy
    if module.__name__ == f"{MCORE}.jit":
        # Decorators ask for the fuser while the other modules are imported, so this cannot be done any later;
        # left alone it is torch.compile, which needs a C++ compiler on the host that runs.
        module.disable_jit_fuser()
    if module.__name__ == f"{MCORE}.tensor_parallel.random":
        _patch_random(module)
    if module.__name__ == f"{MCORE}.transformer.moe.moe_utils":
        _patch_host_copies(module)
    if module.__name__ == f"{MCORE}.tensor_parallel.mappings":
        _patch_unequal_shares(module)


def _patch_host_copies(module: types.ModuleType) -> None:
    """Counts of tokens that the expert dispatcher copies to the host become numpy arrays where they are there already.

    Collectives take numpy's numbers as split sizes, but no tensors; mcore's own function leaves a host tensor alone.
    """
    import torch

    move = module.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    module.__dict__["maybe_move_tensor_to_cpu"] = to_host


def _patch_unequal_shares(module: types.ModuleType) -> None:
    """Gloo shares equally alone; tokens of an expert that is cut over ranks (`parallel.etp`) are not equal shares."""
    import torch
    import torch.distributed as dist

    gather, scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather_rows(
        input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, use_global_buffer=use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(1, *sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded, group=group)
        return torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])

    def scatter_rows(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, use_global_buffer=use_global_buffer)
        total = input_.clone()
        dist.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].clone()

    module.__dict__.update(_gather_along_first_dim=gather_rows, _reduce_scatter_along_first_dim=scatter_rows)


def _patch_random(module: types.ModuleType) -> None:
    """The tracked "CUDA" generator is the host's; both functions replaced here use torch._C."""
    import torch

    def get_state(*args: Any, clone: bool = False, **kwargs: Any) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    module.__dict__.update(_get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)

    # mcore warns when the host's generator moved inside a forked region; here it is the one that is forked.
    def is_unexpected(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    logging.getLogger(module.__name__).addFilter(is_unexpected)


class _Proxy(types.ModuleType):
    """A module with some names of its own; the others are those of the real one."""

    def __init__(self, real: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(f"{real.__name__}(cpu)")
        self.__dict__.update(overrides)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _NoStream:
    """A stream or an event where work is synchronous: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def record_event(self, event: Any = None) -> _NoStream:
        return event if event is not None else _NoStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args: Any) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _no_stream(*args: Any, **kwargs: Any) -> _NoStream:
    return _NoStream()


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _build_proxy() -> types.ModuleType:
    import torch

    cuda = _Proxy(torch.cuda, _cuda_overrides())
    factories = {name: _device_free(getattr(torch, name)) for name in _FACTORIES}
    return _Proxy(torch, {"cuda": cuda, **factories})


def _cuda_overrides() -> dict[str, Any]:
    import torch

    return {
        "current_device": lambda: torch.device(device),
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": _no_stream,
        "default_stream": _no_stream,
        "set_stream": _nothing,
        "stream": _no_context,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "nvtx": _Proxy(
            torch.cuda.nvtx, {"range_push": _nothing, "range_pop": _nothing, "range": _no_context}
        ),
    }


def _device_free(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory whose "cuda" is `device` and that pins nothing."""
    import torch

    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        wanted = kwargs.get("device")
        is_index = isinstance(wanted, int)
        if wanted is not None and (is_index or torch.device(wanted).type == "cuda"):
            kwargs["device"] = torch.device(device)
        return factory(*args, **kwargs)

    make.__name__ = factory.__name__
    return make


def _called_by_mcore() -> bool:
    return _is_mcore(sys._getframe(2).f_globals.get("__name__", ""))


def _patch_tensor_methods() -> None:
    import torch

    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = real_type(self, *args, **kwargs)
        if args or kwargs or not _called_by_mcore():
            return name
        return "torch.cuda." + name.rsplit(".", 1)[-1]

    def to_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_mcore() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = to_cuda  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def device_of_mcore(name: str) -> Iterator[None]:
    """Within the block megatron-core builds on `name` ("meta" for planning) instead of the host's memory."""
    global device
    previous, device = device, name
    try:
        yield
    finally:
        device = previous
