"""Names in a run folder that are in the way, and what killed processes left in it."""

import os

import pytest

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import remove_leftovers
from megatron_v2pe.train.guards.startup_checks import require_usable_folder
from megatron_v2pe.train.metrics.sinks import JsonLines


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "checkpoints/latest"])
def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path, name):
    require_usable_folder(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{name} is a folder, but a run writes a file"):
        require_usable_folder(tmp_path)


def test_a_file_with_the_name_of_a_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConfigError, match=r"checkpoints is a file, but a run writes a folder"):
        require_usable_folder(tmp_path)


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": "3"}', '{"step": true}'])
def test_a_line_of_metrics_without_step_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: step is "):
        JsonLines(tmp_path, first_step=2)


def test_leftovers_of_killed_processes_go_and_younger_files_stay(tmp_path):
    names = (".latest.tmp-12", ".write-test-node-12", ".young.tmp-13", "metrics.jsonl", ".keep")
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000 if "young" not in name else 3000))
    removed = remove_leftovers(tmp_path, before=2000)
    assert sorted(path.name for path in removed) == [".latest.tmp-12", ".write-test-node-12"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {".young.tmp-13", "metrics.jsonl", ".keep"}
    )
    assert remove_leftovers(tmp_path / "none", before=2000) == []
