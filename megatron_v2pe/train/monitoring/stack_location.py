"""Where a process hangs: one call and one line of source, out of all its threads.

    frames of the training thread --innermost of torch.distributed, else a wait--> call, at, within
                                   --none--> its innermost line: it is elsewhere, and the others wait for it

With NCCL a collective returns before it is done, so the line named is then the first that needs its result.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

import megatron_v2pe

_OWN = f"{Path(megatron_v2pe.__file__).parent}/"
_HELPERS = {f"{_OWN}parallel/runtime/comm_clock.py", f"{_OWN}train/reduce.py"}  # what calls them says more
_TORCH = f"{Path(torch.__file__).parent}/"
_TORCH_DISTRIBUTED = f"{_TORCH}distributed/"
_BACKWARD = "_engine_run_backward"  # on a GPU, autograd's own threads run what is below it
_WRAPPERS = ("wrapper", "inner", "decorate_context")  # of torch's logging around every collective
_WAITS = re.compile(r"\.(wait|synchronize|allreduce|allgather|alltoall\w*|barrier|recv|send)\(")
_LONGEST_CALL = 60


@dataclass(frozen=True, kw_only=True)
class StackLocation:
    """Where a process is.

    Attributes:
        is_waiting: in a collective, or for one to end.
        call: name of the collective, else the line of source.
        at: file, line and function it is called from.
        within: the same for the innermost function of this package; "" where that is `at`, or none.
    """

    is_waiting: bool
    call: str
    at: str
    within: str = ""

    def __str__(self) -> str:
        within = f", from {self.within}" if self.within else ""
        return f"{'waits in' if self.is_waiting else 'is at'} {self.call} ({self.at}{within})"


@dataclass(frozen=True)
class _Line:
    """One line of a stack."""

    path: str
    number: int
    function: str

    @property
    def source(self) -> str:
        """The line's text, shortened; the function's name where there is none."""
        text = linecache.getline(self.path, self.number).strip() or self.function
        return text if len(text) <= _LONGEST_CALL else text[: _LONGEST_CALL - 3] + "..."

    def __str__(self) -> str:
        return f"{'/'.join(Path(self.path).parts[-3:])}:{self.number} in {self.function}"


def locate_stall(frames: Mapping[int, FrameType] | None = None, *, main: int | None = None) -> StackLocation:
    """Where this process is, seen from another of its threads.

    Args:
        frames: innermost frame by thread; of this process when None.
        main: the thread that trains; the process's main thread when None.
    """
    frames = sys._current_frames() if frames is None else frames
    main = threading.main_thread().ident if main is None else main
    if main is None or main not in frames:
        return StackLocation(is_waiting=False, call="?", at="the training thread has ended")
    stacks = [_stack(frames[main])]
    if stacks[0][0].function == _BACKWARD:
        stacks += [
            _stack(frame) for ident, frame in frames.items() if ident not in (main, threading.get_ident())
        ]
    for find in (_collective, _wait):
        for stack in stacks:
            if location := find(stack):
                return location
    return _location(stacks[0], 0, call=stacks[0][0].source, is_waiting=False)


def _stack(frame: FrameType) -> list[_Line]:
    """Innermost first, without helpers around a collective."""
    lines = [
        _Line(each.f_code.co_filename, number, each.f_code.co_name)
        for each, number in traceback.walk_stack(frame)
    ]
    return [line for line in lines if line.path not in _HELPERS] or lines


def _collective(stack: Sequence[_Line]) -> StackLocation | None:
    inside = [
        line for line in stack if line.path.startswith(_TORCH_DISTRIBUTED) and line.function not in _WRAPPERS
    ]
    if not inside:
        return None
    return _location(stack, stack.index(inside[0]), call=inside[0].function, is_waiting=True)


def _wait(stack: Sequence[_Line]) -> StackLocation | None:
    """It waits for an operation which it has started before."""
    if not _WAITS.search(stack[0].source):
        return None
    return _location(stack, 0, call=stack[0].source, is_waiting=True)


def _location(stack: Sequence[_Line], index: int, *, call: str, is_waiting: bool) -> StackLocation:
    outside = [line for line in stack[index:] if not line.path.startswith(_TORCH)] or list(stack[index:])
    own = next((line for line in stack[index:] if line.path.startswith(_OWN)), None)
    within = str(own) if own is not None and own != outside[0] else ""
    return StackLocation(is_waiting=is_waiting, call=call, at=str(outside[0]), within=within)
