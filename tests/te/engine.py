"""Transformer Engine's real Python sources on a host without CUDA, for a process of its own.

    real      everything in transformer_engine 2.11.0 that is written in Python, mcore's wrappers of it, our adapter
    made up   transformer_engine_torch (compiled): binds every call to the declared parameters, then runs a reference
              from `kernels.py` or raises; the device, which says that it is a Hopper GPU; onnx, triton, pydantic
              and einops, which are imported but not needed

Kernels, streams and cuDNN's support are not covered: they need a GPU.

`start` changes the process for good, so tests call it in fresh ones only (`tests/support/spawn.py`).
"""

import dataclasses
import enum
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from pathlib import Path

SIGNATURES = Path(__file__).with_name("tex_signatures.json")
TE = "transformer_engine"
NOT_NEEDED = ("onnx", "onnxscript", "triton", "pydantic", "einops")


class NoReferenceError(RuntimeError):
    """A compiled function was called that has no reference here."""


class Anything(types.ModuleType):
    """Any attribute, call, index or module of a package that is imported and not used."""

    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)

    def __call__(self, *args, **kwargs):
        is_decorated = len(args) == 1 and not kwargs and inspect.isfunction(args[0])
        return args[0] if is_decorated else self

    def __getitem__(self, index):
        return self

    def __mro_entries__(self, bases):
        return ()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in NOT_NEEDED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        if spec.name == "pydantic.dataclasses":
            module = types.ModuleType(spec.name)
            module.dataclass = dataclasses.dataclass
            return module
        return Anything(spec.name)

    def exec_module(self, module):
        pass


def start(folder, references):
    """Import Transformer Engine from `folder`, its compiled functions being `references` (name -> function)."""
    import os

    import torch

    os.environ["NVTE_TORCH_COMPILE"] = "0"  # needs a C++ compiler on the host
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # what its own build says: there is no shared object yet
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = compiled_module(references)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    # The package loads its shared objects when it is imported; the place where it does so is imported first.
    common = _import_common()
    common.load_framework_extension = lambda framework: None
    package = importlib.import_module(TE)
    package.common = common
    package.pytorch = importlib.import_module(f"{TE}.pytorch")
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.partition(".")[0] in NOT_NEEDED]:
        del sys.modules[name]  # torch and others ask whether these are there
    _give_a_device(torch)
    return package


def _import_common():
    """`transformer_engine.common` without `transformer_engine/__init__.py`, which would import the rest."""
    spec = importlib.util.find_spec(TE)
    sys.modules[TE] = package = types.ModuleType(TE)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    common = importlib.import_module(f"{TE}.common")
    del sys.modules[TE]
    return common


def compiled_module(references):
    """A module with the declared enums, classes and functions."""
    declared = json.loads(SIGNATURES.read_text(encoding="utf-8"))
    module = types.ModuleType("transformer_engine_torch")
    for name, members in declared["enums"].items():
        setattr(module, name, enum.IntEnum(name, {member: number for number, member in enumerate(members)}))
    for name in declared["classes"]:
        setattr(module, name, type(name, (), {}))
    for kind in ("keyword", "positional"):
        for name, parameters in declared[kind].items():
            setattr(module, name, _function(module, name, parameters, kind, references))
    module.calls = []
    unknown = set(references) - set(declared["keyword"]) - set(declared["positional"])
    assert not unknown, f"references for functions that do not exist: {unknown}"
    return module


def _function(module, name, parameters, kind, references):
    signature = None if parameters is None else _signature(parameters, kind)

    def call(*args, **kwargs):
        module.calls.append(name)
        if signature is None:
            raise NoReferenceError(f"{name}: its parameters are not known")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}({parameters}): {error}") from None
        if name not in references:
            raise NoReferenceError(f"{name} runs on a GPU only")
        bound.apply_defaults()
        return references[name](**bound.arguments)

    return call


def _signature(parameters, kind):
    by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    how = by_keyword if kind == "keyword" else inspect.Parameter.POSITIONAL_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(
                text.rstrip("="), how, default=None if text.endswith("=") else inspect.Parameter.empty
            )
            for text in parameters.split(", ")
            if text
        ]
    )


def _give_a_device(torch):
    """Transformer Engine's modules see a Hopper GPU; everybody else sees what is there."""
    from megatron_v2pe.parallel.runtime import cpu_runtime

    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    device = cpu_runtime._build_proxy()
    device.cuda.__dict__.update(
        is_available=lambda: True,
        get_device_capability=lambda *args: (9, 0),
        get_device_properties=lambda *args: hopper,
    )
    halves = cpu_runtime._Proxy(device, {"bfloat16": torch.float32})
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{TE}.") and module.__dict__.get("torch") is torch:
            # Attention supports half precision only, which would hide errors: here "bfloat16" is float32.
            attention = name.endswith(("dot_product_attention.backends", "dot_product_attention.utils"))
            module.torch = halves if attention else device
    real = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(
        lambda x: sys._getframe(1).f_globals.get("__name__", "").startswith(TE) or real.__get__(x)
    )
    importlib.import_module(f"{TE}.pytorch.utils")._empty_tensor = torch.Tensor
    _wait_once()


def _wait_once():
    """Transformer Engine waits for a request twice, which NCCL allows and gloo never returns from."""
    context_parallel = importlib.import_module(
        f"{TE}.pytorch.attention.dot_product_attention.context_parallel"
    )
    communicate = context_parallel.flash_attn_p2p_communicate

    class Once:
        def __init__(self, work):
            self.work, self.waited = work, False

        def wait(self):
            if not self.waited:
                self.work.wait()
            self.waited = True

    context_parallel.flash_attn_p2p_communicate = lambda *args: [Once(work) for work in communicate(*args)]
