"""Run a verb of the package on the GPU that computes nothing, and list where the host waits for the GPU.

    python -m tests.nullgpu.driver [--waits FILE] VERB ...     under the environment of `conftest.environment`
    python -m tests.nullgpu.driver --script FILE ...           a script in place of a verb

Kernels leave memory as it is, so numbers mean nothing. What decides the course of a run is given: sums over ranks and
gradient norms are 1, and arithmetic of a few integers (sizes of objects that ranks send each other) is done by the
host.
"""

import argparse
import json
import os
import runpy
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = str(Path(__file__).parents[2]) + "/"


def give_numbers():
    """Sums of a step (loss, weights, tokens) and gradient norms are 1 after whatever computes them has run."""
    from megatron_v2pe.train import step

    sum_by_name, grad_norms = step.sum_by_name, step.grad_norms

    def ones(*args, **kwargs):
        return {name: torch.ones_like(sums) for name, sums in sum_by_name(*args, **kwargs).items()}

    step.sum_by_name = ones
    step.grad_norms = lambda *args, **kwargs: dict.fromkeys(grad_norms(*args, **kwargs), 1.0)


FEW = 100_000
FUNCTIONS = ("cat", "stack", "sum", "floor_divide")
METHODS = [
    f"__{name}__"
    for name in ("gt", "lt", "ge", "le", "add", "iadd", "radd", "sub", "mul", "rmul", "floordiv")
]


def compute_few_integers():
    """Operations on small integer tensors of the device have their results, by way of the host."""
    for place, names in ((torch, FUNCTIONS), (torch.Tensor, METHODS)):
        for name in names:
            setattr(place, name, on_host(getattr(place, name)))


def on_host(function):
    def call(*args, **kwargs):
        given = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        if not tensors or not all(
            tensor.is_cuda and not tensor.is_floating_point() and tensor.numel() < FEW for tensor in tensors
        ):
            return function(*args, **kwargs)
        result = function(*(to_host(arg) for arg in args), **kwargs)
        return result.to(tensors[0].device) if isinstance(result, torch.Tensor) else result

    return call


def to_host(argument):
    if isinstance(argument, (list, tuple)):
        return type(argument)(to_host(each) for each in argument)
    return argument.cpu() if isinstance(argument, torch.Tensor) else argument


class Waits:
    """Counts of the places at which the host waits for the device during the steps of a run.

    torch warns where one of its operations waits (`set_sync_debug_mode`). A place is the innermost line of this package
    with the innermost line outside of torch.
    """

    def __init__(self):
        self.places = Counter()
        self.steps = 0

    def start(self):
        warnings.resetwarnings()
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self):
        torch.cuda.set_sync_debug_mode("default")
        warnings.simplefilter("ignore")

    def _note(self, message, category, filename, lineno, file=None, line=None):
        # torch also warns, once, that its mode is a prototype.
        if "called a synchronizing" not in str(message):
            return
        frames = traceback.extract_stack()
        if any(frame.filename == __file__ and frame.name in ("call", "to_host") for frame in frames):
            return  # of this file, not of the run
        ours = [frame for frame in frames if frame.filename.startswith(ROOT + "megatron_v2pe/")]
        if ours:
            self.places[f"{ours[-1].filename.removeprefix(ROOT)} {ours[-1].name}"] += 1

    def watch(self):
        """From the end of the first step, which makes what is kept, to the last but one, after which a run is saved."""
        from megatron_v2pe.train import loop

        advance = loop.Run.advance

        def advanced(run, report):
            advance(run, report)
            if run.state.step == 1:
                self.start()
            elif run.state.step == run.config.optim.steps - 1:
                self.stop()
                self.steps = run.state.step - 1

        loop.Run.advance = advanced


def run_verb(arguments):
    from megatron_v2pe.cli.main import main

    return main(arguments)


def run_script(path, arguments):
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--waits", type=Path)
    parser.add_argument("--script", type=Path)
    args, verb = parser.parse_known_args()
    warnings.simplefilter("ignore")
    torch.backends.cudnn.enabled = False  # no stand-in for its graphs
    torch.backends.cuda.enable_cudnn_sdp(False)
    give_numbers()
    compute_few_integers()
    waits = Waits()
    if args.waits is not None:
        waits.watch()
    try:
        code = run_script(args.script, verb) if args.script is not None else run_verb(verb)
        if args.waits is not None and code == 0:
            counts = {place: count / waits.steps for place, count in sorted(waits.places.items())}
            args.waits.write_text(json.dumps(counts, indent=1))
    except BaseException:  # whatever it is, it is shown and the process fails
        traceback.print_exc()
        code = 1
    end(code)


def end(code):
    """Leave at once, whatever happened: the stand-in's threads do not end, and would keep a failed rank alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
