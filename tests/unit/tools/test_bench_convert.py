"""The conversion benchmark on a tiny model: figures of all steps, equal bytes, and what it says without data."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_v2pe.config import published
from tests.support.hf_folders import GOLDEN

TOOL = Path(__file__).parents[3] / "tools" / "bench_convert.py"


@pytest.fixture
def bench(monkeypatch):
    tiny = json.loads((GOLDEN / "config.json").read_text())
    monkeypatch.setitem(published.PUBLISHED, "tiny", tiny)
    spec = importlib.util.spec_from_file_location("bench_convert", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layouts_of_large_models_need_no_data(bench, capsys):
    assert bench.layout("26B")
    text = capsys.readouterr().out
    assert "25,514,186,112 parameters in 934 tensors, 51.03 GB" in text
    assert "state: 114 files, 51.03 GB" in text
    predicted = int(text.split("import or export: ")[1].split()[0])
    assert predicted < 1.5 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_all_steps_run_and_give_back_the_bytes(bench, tmp_path, capsys, cache):
    bench.run("tiny", tmp_path, [cache], repeats=1)
    text = capsys.readouterr().out
    assert f"{cache}: exported folder is equal, byte for byte" in text
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        f"copy, {cache}",
        f"import, {cache}",
        f"export, {cache}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
