"""Whole training runs as on GPUs: device checks, streams, NCCL's order, and waits of the host.

Strategy: torch's own CUDA build on a stand-in for CUDA's libraries (`cuda.cpp`, `nccl.cpp`). All of a run is real
but the kernels, which do nothing: dispatch, allocator, pinned memory, streams and events as queues that run beside the
host, NCCL between processes with its order and sizes checked. Strictness: a hang, a collective that differs between
ranks, a tensor on the wrong device, or a wait of the host that `waits.json` does not list is a failure. No number is
checked.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests.nullgpu.conftest import ROOT, environment
from tests.support import tiny

pytestmark = [pytest.mark.nullgpu, pytest.mark.slow]

EAGER = "runtime.elementwise=eager"
WAITS = Path(__file__).with_name("waits.json")
LAYOUTS = {
    "cp2": ("parallel.cp=2",),
    "cp2 a2a": ("parallel.cp=2", "parallel.cp_comm_type=a2a"),
    "tp2 sp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp2": ("parallel.pp=2",),
    "dp2": (),
}


def check(done, run_dir):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert len(tiny.metrics(run_dir)) == 5
    assert (run_dir / "checkpoints" / "step_00000005").is_dir()


def check_waits(found):
    """No place waits that is not listed, and none more often; none is listed that waits no longer: {place: times}."""
    listed = json.loads(WAITS.read_text())
    more = {place: times for place, times in found.items() if times > listed.get(place, 0)}
    assert more == {}, (
        "the host waits for the GPU where it did not before; if it has to, list it in waits.json"
    )
    assert set(listed) == set(found), "the host no longer waits at some places; leave them out of waits.json"


def test_one_rank(run, tmp_path):
    waits = tmp_path / "waits.json"
    done = run(EAGER, driver=("--waits", str(waits)))
    check(done, tmp_path / "run")
    check_waits(json.loads(waits.read_text()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks(run, tmp_path, layout):
    waits = tmp_path / "waits.json"
    done = run(EAGER, *LAYOUTS[layout], ranks=2, driver=("--waits", str(waits)))
    check(done, tmp_path / "run")
    check_waits(json.loads(waits.read_text()))


@pytest.mark.parametrize(
    "options",
    [
        ("model.recompute=full", "model.offload_activations=true"),
        (
            "model.recompute=selective",
            "model.mlp_chunks=2",
            "vision.micro_batch_tiles=2",
            "vision.drop_path_rate=0.1",
        ),
        ("vision.tile_multiple=4", "model.swiglu=fused", "lora.language_rank=4"),
    ],
    ids=["full recompute, offload", "selective recompute, tile slices", "tile multiple, adapters"],
)
def test_options(run, tmp_path, options):
    check(run(EAGER, *options), tmp_path / "run")


def test_compiling_fails_here_and_the_run_says_so(run, tmp_path):
    """Triton finds no driver: `auto` continues one by one after a warning, `compiled` is refused."""
    done = run("optim.steps=5")
    check(done, tmp_path / "run")
    assert "torch.compile cannot run here" in done.stderr
    refused = run("runtime.elementwise=compiled", f"runtime.run_dir={tmp_path / 'refused'}")
    assert refused.returncode == 2
    assert "runtime.elementwise is 'compiled', but torch.compile cannot run here" in refused.stderr


DRIVEN = """#!/bin/sh
case "$1" in
    tools/gpu_session.py) exec {python} -m tests.nullgpu.driver --script "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.mark.timeout(600)
def test_a_session_runs_end_to_end(cuda_python, libraries, tmp_path):
    """tools/gpu_session.sh: every part has a row, none an error; its figures mean nothing here.

    The tests marked gpu, which compare numbers, are collected in it but not run.
    """
    driven = tmp_path / "python"
    driven.write_text(DRIVEN.format(python=cuda_python))
    driven.chmod(0o755)
    done = subprocess.run(
        ["bash", "tools/gpu_session.sh", str(tmp_path / "out")],
        env=environment(
            libraries,
            PYTHON=str(driven),
            V2PE_SESSION_ARGS="--tokens 2048 --layers 1 --vision-layers 1",
            PYTEST_ADDOPTS="--collect-only",
        ),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "session.json").read_text())
    assert {row["part"] for row in rows} == {
        *("machine", "products", "attention", "steps", "profile", "losses"),
    }
    assert [row for row in rows if "error" in row] == []
    assert "## steps" in (tmp_path / "out" / "session.md").read_text()
    assert "tests/gpu/test_attention.py::" in (tmp_path / "out" / "tests.log").read_text()


OFFLOAD = """
import os, torch
from megatron_v2pe.models.offload import ActivationOffload

class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, number):
        ctx.save_for_backward(x)
        ctx.number = number
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        assert torch.equal(x.cpu(), wanted[ctx.number]), ctx.number
        seen.append(ctx.number)
        return gradient, None

wanted = [torch.full((1000,), float(number)) for number in range(5)]
seen, outputs = [], []
offload = ActivationOffload(smallest_bytes=1)
with offload:
    for number, values in enumerate(wanted):
        offload.paused = number == 4
        x = values.cuda().requires_grad_()
        outputs.append(Keep.apply(x, number))
        del x
for output in reversed(outputs):
    torch.autograd.backward(output, torch.zeros(1000, device="cuda"))
print("seen", seen)
os._exit(0)
"""


def test_offloaded_tensors_come_back(cuda_python, libraries):
    """Bytes of five tensors over the queues of copies; the one that is kept while paused stays."""
    done = subprocess.run(
        [cuda_python, "-c", OFFLOAD],
        env=environment(libraries),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "seen [4, 3, 2, 1, 0]" in done.stdout, done.stderr[-3000:]


BODIES = {
    "different collectives": "dist.all_reduce(x) if rank else dist.broadcast(x, 0)",
    "a rank that is missing": "rank or dist.all_reduce(x)",
}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (BODIES["different collectives"], 87, "MISMATCH"),
        (BODIES["a rank that is missing"], 86, "HANG"),
    ],
)
def test_what_hangs_a_gpu_is_caught(cuda_python, libraries, tmp_path, body, code, said):
    """Seen failing: otherwise no hang of the tests above would mean anything."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, torch, time, torch.distributed as dist\n"
        "rank = int(os.environ['RANK'])\n"
        "torch.cuda.set_device(rank)\n"
        "dist.init_process_group('nccl')\n"
        "x = torch.zeros(4, device='cuda')\n"
        f"{body}\n"
        "torch.cuda.synchronize() if not rank else time.sleep(30)\n"
    )
    command = [cuda_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command,
        env=environment(libraries, NULLGPU_PATIENCE="3"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert f"exitcode  : {code}" in done.stderr
