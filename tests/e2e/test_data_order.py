"""The same samples in the same order, whatever dies; damaged images, which one rank alone notices.

Order is read from metrics.jsonl: `data_digest` adds up digests of the packs of a step.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.support import tiny

OPTIONS = ["checkpoint.save_every=2", "data.max_bad_samples=0.9"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Data, configuration, and the run that nothing interrupts."""
    root = tmp_path_factory.mktemp("order")
    config = tiny.prepared(root, run="whole")
    tiny.train(config, OPTIONS)
    return root, config


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def digests(run_dir):
    return [(line["step"], line["data_digest"]) for line in lines(run_dir)]


def start(config, overrides, *, ranks):
    return subprocess.Popen(
        tiny.train_command(config, overrides, ranks=ranks), stderr=subprocess.PIPE, text=True
    )


def descendants(process, word):
    """Processes below one whose command line has a word."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_for_step(run_dir, step, process):
    for _ in range(2400):
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached")


@pytest.mark.slow
@pytest.mark.distributed
def test_order_after_the_death_of_a_rank_a_worker_and_the_job(setup, tmp_path):
    """One run: a rank of two dies, then the loader's worker of one, then everything; each start has another layout."""
    _, config = setup
    run = [*OPTIONS, f"runtime.run_dir={tmp_path}", "optim.steps=18"]
    tiny.train(config, [*run, f"runtime.run_dir={tmp_path / 'whole'}"])
    wanted = digests(tmp_path / "whole")
    assert len({digest for _, digest in wanted}) > 12

    job = start(config, [*run, "data.num_workers=1"], ranks=2)
    wait_for_step(tmp_path, 3, job)
    ranks = [child for child in descendants(job, "megatron_v2pe train") if "forkserver" not in child.name()]
    ranks[-1].kill()
    assert job.wait(120) != 0  # the launcher ends the others

    job = start(config, [*run, "data.num_workers=1"], ranks=1)
    wait_for_step(tmp_path, 7, job)
    workers = [child for child in descendants(job, "forkserver") if child.ppid() != job.pid]
    assert workers
    workers[0].kill()
    _, log = job.communicate(timeout=120)
    assert job.returncode == 2, log[-4000:]
    assert "a data loading process ended" in log
    assert "lower data.prefetch_mib" in log

    job = start(config, run, ranks=2)
    wait_for_step(tmp_path, 11, job)
    for child in [*descendants(job, "megatron_v2pe"), psutil.Process(job.pid)]:
        os.kill(child.pid, signal.SIGKILL)
    job.wait(60)

    tiny.train(config, [*run, "data.num_workers=2"])
    assert digests(tmp_path) == wanted


@pytest.mark.slow
@pytest.mark.distributed
def test_damaged_images_have_no_loss_on_any_rank(setup, tmp_path):
    """Damaged after lengths were measured, so that only the rank that decodes it knows; cp 2 gives the curve of one."""
    root, config = setup
    cache = f"data.cache_dir={root / 'whole' / 'data_cache'}"
    image = root / "data" / "0.png"
    content = image.read_bytes()
    try:
        image.write_bytes(content[:200] + bytes(60) + content[260:])
        log = tiny.train(config, [*OPTIONS, cache, f"runtime.run_dir={tmp_path / 'one'}"])
        tiny.train(config, [*OPTIONS, cache, f"runtime.run_dir={tmp_path / 'two'}", "parallel.cp=2"], ranks=2)
        too_many = start(
            config,
            [cache, f"runtime.run_dir={tmp_path / 'few'}", "parallel.cp=2", "data.max_bad_samples=0.05"],
            ranks=2,
        )
        _, refusal = too_many.communicate(timeout=240)
    finally:
        image.write_bytes(content)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert digests(tmp_path / "one") == digests(root / "whole") == digests(tmp_path / "two")
    assert 0 < one[-1]["bad_samples"] == two[-1]["bad_samples"]
    np.testing.assert_allclose(tiny.curve(tmp_path / "two"), tiny.curve(tmp_path / "one"), rtol=1e-5)
    assert tiny.curve(tmp_path / "one") != tiny.curve(root / "whole")
    named = [json.loads(line) for line in (tmp_path / "two" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(named) == len({line["sample"] for line in named}) == two[-1]["bad_samples"]
    assert all("0.png: cannot be read as an image" in line["message"] for line in named)
    assert f"no loss on {named[0]['sample']}" in log
    assert too_many.returncode != 0
    assert "data.max_bad_samples = 0.05 allows 1; repair them or raise the limit" in refusal


@pytest.mark.slow
@pytest.mark.distributed
def test_lines_that_one_rank_cannot_read_have_no_loss_on_any(setup, tmp_path):
    """Rank 1 of cp 2 alone reads garbage for two samples; the curve is that of one rank that cannot read them."""
    root, config = setup
    cache = f"data.cache_dir={root / 'whole' / 'data_cache'}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launch, rank, more in (("one", [], 0, []), ("two", launcher, 1, ["parallel.cp=2"])):
        run = [str(config), *OPTIONS, cache, f"runtime.run_dir={tmp_path / name}", *more]
        command = [*launch, "-m", "tests.support.spoiled_lines", str(rank), '"s3","s6"', *run]
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    np.testing.assert_allclose(tiny.curve(tmp_path / "two"), tiny.curve(tmp_path / "one"), rtol=1e-5)
    assert tiny.curve(tmp_path / "one") != tiny.curve(root / "whole")
    assert digests(tmp_path / "two") == digests(root / "whole")
    named = [json.loads(line) for line in (tmp_path / "two" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["sample"] for line in named} == {"tiny:4", "tiny:7"}
    assert all("train.jsonl" in line["message"] and "not utf-8" in line["message"] for line in named)
