"""generate and evaluate straight from a Hugging Face folder over two ranks: the answers of one rank, nothing stored."""

import json

import pytest

from megatron_v2pe.cli.main import main
from tests.support.hf_folders import golden_copy
from tests.support.warm import run_verb

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
HOW = ("--dtype", "float32", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden_copy(tmp_path_factory.mktemp("answers") / "hf")


@pytest.mark.parametrize("layout", [("--tp", "2"), ("--pp", "2"), ("--cp", "2")], ids=["tp2", "pp2", "cp2"])
def test_generate(folder, layout, capsys):
    before = sorted(path.name for path in folder.rglob("*"))
    assert main(["generate", str(folder), "Hello", *HOW]) == 0
    wanted = capsys.readouterr().out
    done = run_verb("generate", folder, "Hello", *HOW, *layout, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == wanted
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_evaluate(folder, tmp_path):
    question = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    options = ("--data", tmp_path / "q.jsonl", *HOW)
    assert main(["evaluate", *map(str, (folder, *options)), "--out", str(tmp_path / "one")]) == 0
    done = run_verb("evaluate", folder, *options, "--tp", "2", "--out", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [(tmp_path / name / "predictions_default.jsonl").read_text() for name in ("one", "two")]
    assert rows[0] == rows[1]
