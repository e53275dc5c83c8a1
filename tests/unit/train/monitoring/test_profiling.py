"""Traces of steps: which steps and ranks, what is written, and that a trace that cannot be written costs no run."""

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from megatron_v2pe.config.schema import RuntimeConfig
from megatron_v2pe.train.monitoring import profiling
from megatron_v2pe.train.monitoring.profiling import StepProfiler, operator_table


def steps(run_dir, *, rank=0, first=1, last=6, asked_after=(), **runtime):
    """Runs steps of one product each under the profiler."""
    asked = {"now": False}
    profiler = StepProfiler(
        run_dir,
        rank=rank,
        runtime=RuntimeConfig(**runtime),
        first_step=first,
        last_step=last,
        is_asked=lambda: asked["now"],
    )
    with profiler:
        for step in range(first, last + 1):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
            asked["now"] = step in asked_after
            profiler.beat(step + 1)


def written(run_dir):
    return sorted(path.name for path in run_dir.glob("profile/*")) + [
        path.name for path in run_dir.glob("profile/.*")
    ]


def files(*numbers, rank=0):
    return sorted(f"rank_{rank}_step_{number}.{kind}" for number in numbers for kind in ("json.gz", "txt"))


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    steps(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"profile_from_step": 1, "profile_steps": 1}, [1]),  # from the very first step
        ({"profile_from_step": 3}, [3, 4]),
        ({"profile_from_step": 6}, [6]),  # the run ends in the window
        ({"profile_from_step": 2, "first": 3}, [3]),  # the run was started again in the window
        ({"asked_after": [2]}, [3, 4]),
        ({"asked_after": [2], "profile_steps": 1, "profile_ranks": "all", "rank": 0}, [3]),
        ({"profile_from_step": 2, "profile_ranks": "1,3"}, []),
    ],
)
def test_which_steps_are_profiled(tmp_path, settings, expected):
    steps(tmp_path, **settings)
    assert written(tmp_path) == files(*expected)


def test_a_chosen_rank_writes_under_its_own_name(tmp_path):
    steps(tmp_path, rank=3, profile_from_step=2, profile_steps=1, profile_ranks="1,3")
    assert written(tmp_path) == files(2, rank=3)


def test_a_trace_is_one_that_viewers_read_and_its_table_names_the_work(tmp_path):
    steps(tmp_path, profile_from_step=2, profile_steps=1)
    with gzip.open(tmp_path / "profile" / "rank_0_step_2.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    text = (tmp_path / "profile" / "rank_0_step_2.txt").read_text()
    assert text.startswith("rank 0, step 2, ")
    assert "  aten::mm\n" in text


def test_a_step_that_does_not_end_leaves_no_trace_and_torch_as_it_was(tmp_path):
    plain = vars(dist.Work)["wait"]
    profiler = StepProfiler(
        tmp_path,
        rank=0,
        runtime=RuntimeConfig(profile_from_step=1),
        first_step=1,
        last_step=6,
        is_asked=lambda: False,
    )
    with profiler:  # and no beat
        assert vars(dist.Work)["wait"] is not plain
    assert vars(dist.Work)["wait"] is plain
    assert written(tmp_path) == []


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_v2pe"), "propagate", True)
    (tmp_path / "profile").write_text("a file where the folder should be")
    steps(tmp_path, profile_from_step=2, profile_steps=1)
    assert "cannot be written (" in caplog.text
    assert "the run continues" in caplog.text


def test_a_trace_that_was_cut_short_by_a_full_disk_is_not_kept(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_v2pe"), "propagate", True)
    whole = profiling._require_whole

    def cut(path):
        path.write_bytes(path.read_bytes()[:-200])
        whole(path)

    monkeypatch.setattr(profiling, "_require_whole", cut)
    steps(tmp_path, profile_from_step=2, profile_steps=1)
    assert "the trace is cut short" in caplog.text
    assert written(tmp_path) == []


def average(key, *, host=0.0, device=0.0, on_device=False, is_annotation=False):
    return SimpleNamespace(
        key=key,
        count=2,
        self_cpu_time_total=host * 1e6,
        self_device_time_total=device * 1e6,
        device_type=DeviceType.CUDA if on_device else DeviceType.CPU,
        is_user_annotation=is_annotation,
    )


def test_communication_on_the_host():
    averages = [
        average("aten::mm", host=3.0),
        average("c10d::send", host=0.25),
        average(profiling._WAIT, host=0.75),
    ]
    text = operator_table(averages, "title", seconds=5.0)
    assert "communication 1.000 s, 20.0 % of the step" in text
    assert text.index("aten::mm") < text.index(profiling._WAIT) < text.index("c10d::send")
    assert "   3.0000  75.0 %       2  aten::mm\n" in text


def test_of_a_device_kernels_count_and_nothing_twice():
    averages = [
        average("aten::mm", host=9.0, device=3.0),  # the operator that started the kernel
        average("gemm", device=3.0, on_device=True),
        average("ncclDevKernel_AllReduce", device=1.0, on_device=True),
        average("nccl:all_reduce", device=1.0, on_device=True, is_annotation=True),
    ]
    text = operator_table(averages, "title", seconds=10.0)
    assert "communication 1.000 s, 10.0 % of the step" in text
    assert "   3.0000  75.0 %       2  gemm\n" in text
    assert "aten::mm" not in text


def test_a_long_table_is_cut_and_its_rest_summed():
    text = operator_table([average(f"op{number}", host=1.0) for number in range(50)], "title", seconds=50.0)
    assert text.endswith("  30.0000  60.0 %          30 others\n")
