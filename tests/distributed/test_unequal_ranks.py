"""Two real ranks that were not started alike, or do not meet, end at once with the reason and train nothing.

Strategy: kinds of mismatch that once trained on or hung: a rate, another layout, another copy of the data. That every
field and file counts is tested in process (tests/unit/train/guards/test_rank_facts.py).
"""

import json
import shutil
import time

import pytest

from tests.support import tiny
from tests.support.warm import run_verb

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("unequal"))


def started(config, run_dir, *of_rank_1, overrides=()):
    variables = {"V2PE_TEST_OF_RANK_1": json.dumps(of_rank_1)}
    overrides = [f"runtime.run_dir={run_dir}", "runtime.hang_timeout_s=60", *overrides]
    return run_verb(
        "train",
        config,
        *overrides,
        ranks=2,
        entry="tests.support.unequal:main",
        variables=variables,
        timeout=100,
    )


def check_refused(done, run_dir, message):
    assert done.returncode == 2, done.stderr[-4000:]
    assert "ranks were not started alike: rank 1 on " in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "of_rank_1", "message"),
    [
        ((), "optim.lr=2e-3", "optim.lr is 0.002 (rank 0 on "),
        (("parallel.cp=2",), "parallel.tp=2 parallel.cp=1", "parallel.tp is 2 (rank 0 on "),
    ],
)
def test_another_configuration_of_one_rank_is_refused_by_name(
    config, tmp_path, overrides, of_rank_1, message
):
    done = started(config, tmp_path, *of_rank_1.split(), overrides=overrides)
    check_refused(done, tmp_path, message)


def test_another_copy_of_the_data_is_refused_by_name(config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(config.parent / "data", copy)
    content = (copy / "2.png").read_bytes()
    (copy / "2.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    values = json.loads((copy / "meta.json").read_text())
    for entry in values.values():
        entry["root"] = str(copy)
    (copy / "meta.json").write_text(json.dumps(values))
    check_refused(
        started(config, tmp_path / "run", f"data.meta={copy}/meta.json"),
        tmp_path / "run",
        "2.png (data.meta) is ",
    )


@pytest.mark.parametrize(("rank", "place"), [(0, "clients joined"), (1, "timed out")])
def test_ranks_that_do_not_meet_end_within_the_time_limit(config, tmp_path, rank, place):
    """Rank 0 of a WORLD_SIZE that is too large, rank 1 with a MASTER_PORT at which nobody is."""
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }
    port = {"MASTER_PORT": "0"} if rank == 0 else {}
    variables = {**{name: str(value) for name, value in launched.items()}, **port}
    begin = time.monotonic()
    overrides = [f"runtime.run_dir={tmp_path}", "runtime.hang_timeout_s=12"]
    done = run_verb("train", config, *overrides, variables=variables, timeout=100)
    assert done.returncode == 2, done.stderr[-4000:]
    assert (
        f"rank {rank} of WORLD_SIZE 2 did not meet the others at MASTER_ADDR:MASTER_PORT 127.0.0.1:"
        in done.stderr
    )
    assert place in done.stderr
    assert time.monotonic() - begin < 40
