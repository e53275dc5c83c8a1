"""Peak memory of a part of a network from a list of its operations: what autograd allocates, keeps and frees.

    ops       norm -> qkv -> rotate -> attend -> project -> add -> ...
    forward   allocate an output, free what nobody needs any more, never what backward needs
    backward  from the last op to the first: allocate gradients of inputs, free what was kept for the op

A tape says for each operation how large its output is, which tensors backward reads again, and what it needs for a
moment. `peaks` walks it both ways. Bytes are of one rank and one micro batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation; its output has its name.

    Attributes:
        name: name of the operation and of its output.
        inputs: names of earlier outputs that get gradients; "input" is what the tape starts from.
        output_bytes: size of the output; 0 for a view.
        keeps: names of tensors that backward reads (inputs or the output).
        keeps_extra_bytes: other memory held until backward (statistics, hidden copies).
        forward_bytes: allocated and freed within the forward operation.
        backward_bytes: allocated and freed within the backward operation (weight gradients, workspaces).
        gradient_bytes: size of the gradient that goes to each input; None means the input's own size.
        view_of: name of the tensor whose memory the output is.
        passes_gradient: inputs get the output's own gradient (additions).
        is_matrix: its time is that of its FLOPs; otherwise that of the bytes it reads and writes.
        moved: bytes read and written in forward and in backward, where they do not follow from the rest.
    """

    name: str
    inputs: tuple[str, ...]
    output_bytes: float = 0.0
    keeps: tuple[str, ...] = ()
    keeps_extra_bytes: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    gradient_bytes: tuple[float, ...] | None = None
    view_of: str | None = None
    passes_gradient: bool = False
    is_matrix: bool = False
    moved: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What a tape needs, in bytes beyond its input.

    Attributes:
        kept_bytes: held between forward and backward.
        kept: the same by tensor.
        forward_bytes: most during a forward pass that keeps.
        inference_bytes: most during a forward pass that keeps nothing (also a recomputed part's first pass).
        backward_bytes: most during backward, what is kept and the output's gradient included.
        output_bytes: size of the last output.
    """

    kept_bytes: float
    kept: dict[str, float] = field(default_factory=dict)
    forward_bytes: float
    inference_bytes: float
    backward_bytes: float
    output_bytes: float


def peaks(ops: Sequence[Op], *, input_bytes: float, keeps_input: bool = False) -> Peaks:
    """Walk a tape forward and backward.

    Args:
        ops: in order; the last one's output is the tape's.
        input_bytes: size of the input, which is the caller's and not counted.
        keeps_input: count the input among what is kept, when an operation keeps it.
    """
    tape = _Tape(ops, input_bytes)
    kept = tape.kept()
    counted = {name: size for name, size in kept.items() if keeps_input or name != INPUT}
    return Peaks(
        kept_bytes=sum(counted.values()),
        kept=counted,
        forward_bytes=tape.forward(set(kept)),
        inference_bytes=tape.forward(set()),
        backward_bytes=tape.backward(counted),
        output_bytes=tape.size(ops[-1].name),
    )


def moved_bytes(ops: Sequence[Op], *, input_bytes: float) -> tuple[float, float]:
    """Bytes that operations other than matrix products read and write, (forward, backward).

    Forward: inputs once, the output once, temporaries written and read. Backward: the output's gradient, what was kept,
    the inputs' gradients, temporaries written and read. Additions move nothing in backward.
    """
    tape = _Tape(ops, input_bytes)
    forward = backward = 0.0
    for op in ops:
        if op.moved is not None:
            forward, backward = forward + op.moved[0], backward + op.moved[1]
        if op.moved is not None or op.is_matrix or op.view_of is not None:
            continue
        given = op.gradient_bytes or tuple(tape.size(name) for name in op.inputs)
        forward += sum(given) + op.output_bytes + 2 * op.forward_bytes
        if not op.passes_gradient:
            backward += op.output_bytes + 2 * sum(given) + 2 * op.backward_bytes
    return forward, backward


class _Tape:
    """Sizes and lifetimes of the tensors of a list of operations."""

    def __init__(self, ops: Sequence[Op], input_bytes: float) -> None:
        self.ops = ops
        self.sizes = {INPUT: input_bytes, **{op.name: op.output_bytes for op in ops if op.view_of is None}}
        self.roots = {INPUT: INPUT}
        self.last_use: dict[str, int] = {}
        for index, op in enumerate(ops):
            self.roots[op.name] = self.roots[op.view_of] if op.view_of else op.name
            for name in op.inputs:
                self.last_use[self.roots[name]] = index

    def size(self, name: str) -> float:
        return self.sizes[self.roots[name]]

    def kept(self) -> dict[str, float]:
        """Memory that backward needs, each tensor once."""
        found: dict[str, float] = {}
        for op in self.ops:
            for name in op.keeps:
                found[self.roots[name]] = self.size(name)
            if op.keeps_extra_bytes:
                found[f"{op.name} (inside)"] = op.keeps_extra_bytes
        return found

    def forward(self, kept: Iterable[str]) -> float:
        """Most memory at a time, the input excluded; `kept` is never freed."""
        kept = set(kept)
        last = self.roots[self.ops[-1].name]
        live: dict[str, float] = {}
        most = 0.0
        for index, op in enumerate(self.ops):
            if op.view_of is None:
                live[op.name] = op.output_bytes
            inside = op.keeps_extra_bytes
            if f"{op.name} (inside)" in kept:
                live[f"{op.name} (inside)"], inside = inside, 0.0
            most = max(most, sum(live.values()) + op.forward_bytes + inside)
            done = [n for n, use in self.last_use.items() if use <= index and n not in kept and n != last]
            for name in done:
                live.pop(name, None)
        return most

    def backward(self, kept: dict[str, float]) -> float:
        """Most memory at a time: kept tensors, gradients under way, temporaries."""
        held = dict(kept)
        readers: dict[str, int] = {}
        for index, op in reversed(list(enumerate(self.ops))):
            for name in op.keeps:
                readers[self.roots[name]] = index  # the first op that keeps it is the last to read it
        last = self.ops[-1].name
        gradients = {last: _Gradient()}
        gradients[last].add(self.size(last))
        most = _total(held, gradients)
        for index, op in reversed(list(enumerate(self.ops))):
            self._send(op, gradients.get(op.name, _Gradient()), gradients)
            most = max(most, _total(held, gradients) + op.backward_bytes)
            gradients.pop(op.name, None)
            for name in op.inputs:
                gradients[name].merge()
            held.pop(f"{op.name} (inside)", None)
            for name in [name for name, reader in readers.items() if reader == index]:
                held.pop(name, None)
        return most

    def _send(self, op: Op, incoming: _Gradient, gradients: dict[str, _Gradient]) -> None:
        """Give each input its gradient."""
        sizes = op.gradient_bytes or tuple(self._own_size(name) for name in op.inputs)
        for name, size in zip(op.inputs, sizes, strict=True):
            target = gradients.setdefault(name, _Gradient())
            if op.passes_gradient:
                target.borrow(incoming, is_part=size < self._own_size(name))
            elif size < self._own_size(name):
                target.add_part(size)
            else:
                target.add(size)

    def _own_size(self, name: str) -> float:
        for op in self.ops:
            if op.name == name and op.view_of is not None:
                return op.output_bytes
        return self.size(name)


class _Gradient:
    """Gradient of one tensor: memory of its own, memory that is another gradient's, or parts of it."""

    def __init__(self) -> None:
        self.cells: list[_Cell] = []

    def borrow(self, other: _Gradient, *, is_part: bool) -> None:
        """Share the other's memory; where there is a whole gradient already, autograd adds in place."""
        if is_part or not self.cells:
            self.cells = [*self.cells, *other.cells]

    def add(self, size: float) -> None:
        """A gradient of full size; what was there before lives until `merge`."""
        self.cells = [*self.cells, _Cell(size)]

    def add_part(self, size: float) -> None:
        """A gradient of some rows or channels; the parts wait until the whole is put together."""
        self.cells = [*self.cells, _Cell(size, is_part=True)]

    def merge(self) -> None:
        """Full gradients are added up in the memory of the newest."""
        if self.cells and not self.cells[-1].is_part:
            self.cells = self.cells[-1:]


class _Cell:
    """Memory that one or several gradients use."""

    def __init__(self, size: float, *, is_part: bool = False) -> None:
        self.size = size
        self.is_part = is_part


def _total(held: dict[str, float], gradients: dict[str, _Gradient]) -> float:
    cells = {id(cell): cell.size for gradient in gradients.values() for cell in gradient.cells}
    return sum(held.values()) + sum(cells.values())
