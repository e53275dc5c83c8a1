"""A case of a PIIP file, what a run of it gives, and the comparison of the two.

modules.json + .safetensors  -->  PyramidCase  --run(dtype)-->  Run  -->  rows
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_v2pe.verification.golden.rows import Row, compared, equal

FLOOR = 2e-5  # float32 runs of the release differ from float64 ones by up to 6e-6 in small cases
ERROR_FACTOR = 4.0  # ... and by `float32_error` in the case at hand
LOSS_FLOAT64 = 1e-9  # relative to the sum of the products' sizes; float64 rounding in sums of a few thousand
GRADIENT_SHARE = 1e-3  # of the case's largest gradient: the least by which a parameter's error is divided
PIXEL_ROWS = (slice(None), slice(None), slice(1, None, 8), slice(3, None, 8))


@dataclass(frozen=True, kw_only=True)
class PyramidCase:
    """One case.

    Attributes:
        file: name of its file, such as `towers`.
        name: name inside the file.
        values: its object in the json.
        tensors: open safetensors file; keys are `name/part/tensor`.
    """

    file: str
    name: str
    values: dict[str, Any]
    tensors: Any

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of the release's class."""
        config: dict[str, Any] = self.values["config"]
        return config

    @cached_property
    def _keys(self) -> list[str]:
        return list(self.tensors.keys())

    def part(self, part: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of a part (`input`, `weight`, `output`, ...) by name, in a dtype or as stored."""
        prefix = f"{self.name}/{part}/"
        found = {key[len(prefix) :]: key for key in self._keys if key.startswith(prefix)}
        return {
            name: self.tensors.get_tensor(key).to(dtype) if dtype else self.tensors.get_tensor(key)
            for name, key in found.items()
        }

    def tolerance(self, kind: str) -> float:
        """Of outputs, inter or gradients, from what the release's own float32 run is off by."""
        return max(FLOOR, ERROR_FACTOR * float(self.values["float32_error"][kind]))


@dataclass(kw_only=True)
class Run:
    """What one run of a case gave; parameters and inputs carry their gradients after `backward`.

    Attributes:
        outputs: by name.
        inter: values on the way, by name.
        parameters: by the release's name.
        inputs: by name.
        gradients: gradients by the release's name, for models whose parameters have other names; None where a
            parameter takes no part.
    """

    outputs: dict[str, Tensor]
    inter: dict[str, Tensor]
    parameters: dict[str, Tensor]
    inputs: dict[str, Tensor]
    gradients: Callable[[], dict[str, Tensor | None]] | None = field(default=None)

    def backward(self, cotangents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss, and the sum of its products' sizes; fills the gradients."""
        products = [self.outputs[name] * cotangent for name, cotangent in cotangents.items()]
        loss = torch.stack([product.sum() for product in products]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.stack([product.detach().abs().sum() for product in products]).sum()

    def all_gradients(self) -> dict[str, Tensor | None]:
        """Of parameters by name, and of inputs as `input/<name>`."""
        own = self.gradients() if self.gradients else {k: v.grad for k, v in self.parameters.items()}
        return own | {f"input/{name}": value.grad for name, value in self.inputs.items()}


RunCase = Callable[[PyramidCase, torch.dtype], Run]


def open_cases(path: Path) -> Iterator[PyramidCase]:
    """All cases of a json file and its safetensors."""
    tensors = safe_open(path.with_suffix(".safetensors"), framework="pt")
    for name, values in json.loads(path.read_text(encoding="utf-8"))["cases"].items():
        yield PyramidCase(file=path.stem, name=name, values=values, tensors=tensors)


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as leaves that gather gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def case_rows(case: PyramidCase, run_case: RunCase) -> Iterator[Row]:
    """Everything that is recorded of a case with a loss: a float32 run, and the loss of a float64 run."""
    name = f"piip/{case.file}/{case.name}"
    run = run_case(case, torch.float32)
    loss, size = run.backward(case.part("cotangent", torch.float32))
    yield from value_rows(case, name, run)
    yield _loss_row(name, "loss", loss, size, case.values["loss"], case.tolerance("outputs"))
    yield from _gradient_rows(case, name, run.all_gradients())
    wide = run_case(case, torch.float64)
    wide_loss, size = wide.backward(case.part("cotangent", torch.float64))
    yield _loss_row(name, "loss_float64", wide_loss, size, case.values["loss_float64"], LOSS_FLOAT64)


def value_rows(case: PyramidCase, name: str, run: Run) -> Iterator[Row]:
    """Outputs and values on the way; zero gates give them exactly where the recorder says so."""
    for kind, quantity, values in (("output", "outputs", run.outputs), ("inter", "inter", run.inter)):
        wanted = case.part(kind)
        if not wanted:
            continue
        missing = sorted(set(wanted) - set(values))
        if missing:
            yield equal(name, quantity, is_equal=False, detail=f"not computed: {missing}")
            continue
        errors = {key: _distance(values[key], tensor) for key, tensor in wanted.items()}
        yield _worst(name, quantity, errors, case.tolerance(quantity))
    if case.config.get("zero_gates"):
        same = torch.equal(run.outputs["hidden1"], run.inter["branch1_alone"])
        yield equal(name, "hidden1 == branch1_alone", is_equal=same, detail="zero gates change the branch")


def _loss_row(name: str, quantity: str, loss: Tensor, size: Tensor, wanted: float, tolerance: float) -> Row:
    """Deviation relative to the sum of the products' sizes, in which terms of both signs cancel."""
    error = abs(float(loss) - wanted) / float(size)
    return compared(name, quantity, error=error, tolerance=min(tolerance, 1e-6))


def _gradient_rows(case: PyramidCase, name: str, gradients: dict[str, Tensor | None]) -> Iterator[Row]:
    values, tolerance = case.values, case.tolerance("gradients")
    unused = sorted(key for key, gradient in gradients.items() if gradient is None)
    is_same = unused == sorted(values["unused"])
    yield equal(name, "unused", is_equal=is_same, detail=f"without a gradient: {unused[:4]}")
    floor = GRADIENT_SHARE * float(values["grad_largest"])
    known = {key: gradient for key, gradient in gradients.items() if gradient is not None}
    norms, slices = {}, {}
    for key, wanted_l2 in values["grad_l2"].items():
        if key in known:
            scale = max(float(wanted_l2), floor)
            norms[key] = abs(float(known[key].double().norm()) - float(wanted_l2)) / scale
    for key, wanted in case.part("grad").items():
        rows = values["grad_rows"][key]
        if key in known:
            own = known[key] if isinstance(rows, str) else known[key][rows]
            slices[key] = _distance(own, wanted) / max(float(known[key].abs().max()), floor)
    for key, wanted in case.part("grad_input").items():
        own = known[f"input/{key}"]
        own = own[PIXEL_ROWS] if key.startswith("pixels") else own
        slices[f"input/{key}"] = _distance(own, wanted) / max(float(own.abs().max()), floor)
    for key, wanted_l2 in values.get("grad_input_l2", {}).items():
        own = known[f"input/{key}"]
        norms[f"input/{key}"] = abs(float(own.double().norm()) - float(wanted_l2)) / max(wanted_l2, floor)
    yield _worst(name, "grad_l2", norms, tolerance)
    yield _worst(name, "grad", slices, tolerance)
    zeros = {key: float(known[key].abs().max()) for key in values["zero_gradient"] if key in known}
    if zeros and case.config.get("zero_gates"):
        yield _worst(name, "zero_gradient", zeros, 0.0)
    elif zeros:
        yield _worst(name, "zero_gradient", {k: v / floor for k, v in zeros.items()}, tolerance)


def _distance(value: Tensor, wanted: Tensor) -> float:
    return float((value.detach().cpu().double().reshape(wanted.shape) - wanted.double()).abs().max())


def _worst(name: str, quantity: str, errors: dict[str, float], tolerance: float) -> Row:
    key = max(errors, key=lambda each: (errors[each] != errors[each], errors[each]))
    return compared(name, quantity, error=errors[key], tolerance=tolerance, detail=f"worst in {key}")
