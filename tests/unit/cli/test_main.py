"""cli.main: verbs, and how errors become exit codes."""

import subprocess
import sys
import types

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import megatron_v2pe
from megatron_v2pe.cli import main as cli
from megatron_v2pe.core.errors import ConfigError


def a_verb(monkeypatch, action):
    module = types.SimpleNamespace(NAME="doctor", HELP="help", add_arguments=lambda parser: None, run=action)
    monkeypatch.setattr(cli, "_load", lambda verb: module)


def as_rank(monkeypatch, rank, local_rank):
    values = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def raise_(error):
    raise error


def test_the_verb_gives_the_exit_code(monkeypatch):
    a_verb(monkeypatch, lambda args: 7)
    assert cli.main(["doctor"]) == 7


def test_a_users_mistake_is_one_message_and_2(monkeypatch, capsys):
    a_verb(monkeypatch, lambda args: raise_(ConfigError("parallel.tp is 3, but ...")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "megatron-v2pe: parallel.tp is 3, but ...\n"


def test_our_mistake_is_a_traceback_and_1(monkeypatch, capsys):
    a_verb(monkeypatch, lambda args: raise_(KeyError("inner")))
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "KeyError: 'inner'" in error


@pytest.mark.parametrize(("rank", "local_rank", "seconds"), [(1, 1, 3.0), (2, 0, 10.0)])
def test_another_rank_gives_rank_0_time_and_is_not_lost(monkeypatch, capsys, rank, local_rank, seconds):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    as_rank(monkeypatch, rank, local_rank)
    a_verb(monkeypatch, lambda args: raise_(ConfigError("bad file")))
    assert cli.main(["doctor"]) == 2
    assert waited == [seconds]
    assert capsys.readouterr().err == f"megatron-v2pe: rank {rank}: bad file\n"


def test_a_mistake_ends_the_later_starts_of_a_launch_before_they_do_anything(monkeypatch, capsys, tmp_path):
    def start(attempt):
        monkeypatch.setenv(
            "TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / "0" / "error.json")
        )
        return cli.main(["doctor"])

    a_verb(monkeypatch, lambda args: raise_(ConfigError("parallel.tp is 3, but ...")))
    assert start(0) == 2
    assert capsys.readouterr().err == "megatron-v2pe: parallel.tp is 3, but ...\n"
    monkeypatch.setattr(cli, "_load", lambda verb: pytest.fail("the verb was loaded"))
    assert start(1) == 2
    assert capsys.readouterr().err == ""


def test_a_mistake_that_a_restart_may_mend_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    error = ConfigError("a file is gone")
    error.is_final = False
    a_verb(monkeypatch, lambda args: raise_(error))
    assert cli.main(["doctor"]) == 2
    a_verb(monkeypatch, lambda args: 0)
    assert cli.main(["doctor"]) == 0


def test_a_broken_launcher_is_a_users_mistake(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["doctor"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--verbose"]])
def test_no_such_verb(arguments, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "megatron-v2pe:" in captured.err


def test_overview(capsys):
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"  {verb} " in output for verb in cli.VERBS)


def test_an_overview_does_not_import_torch():
    code = "import sys, megatron_v2pe.cli.main as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-v2pe {megatron_v2pe.__version__}\n"


def test_tasks_of_srun_without_torchrun_do_not_start(monkeypatch, capsys):
    a_verb(monkeypatch, lambda args: pytest.fail("it was run"))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert cli.main(["train"]) == 2
    assert "srun started 2 processes" in capsys.readouterr().err
    a_verb(monkeypatch, lambda args: 0)
    assert cli.main(["doctor"]) == 0


def test_torchrun_gets_the_message_of_a_mistake_at_every_start(monkeypatch, tmp_path):
    for attempt in (0, 1):
        path = tmp_path / f"attempt_{attempt}" / "0" / "error.json"
        path.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        a_verb(monkeypatch, lambda args: raise_(ConfigError("parallel.tp is 3, but ...")))
        assert cli.main(["doctor"]) == 2
        failure = ProcessFailure(
            local_rank=0, pid=1, exitcode=2, error_file=str(path)
        )  # as torchrun reads it
        assert "parallel.tp is 3, but ..." in failure.message["extraInfo"]["py_callstack"]
