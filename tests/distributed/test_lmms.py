"""lmms-eval as a second judge, offline: recorded questions, replayed rows, and the model in process on 1 and 2 ranks.

lmms-eval is an optional extra, so these tests skip where it is not installed.
"""

import io
import json
import random

import pytest
from PIL import Image

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.evaluation.benchmarks.base import Response
from megatron_v2pe.evaluation.benchmarks.registry import find_benchmark
from megatron_v2pe.evaluation.jobs.job import run_job
from megatron_v2pe.evaluation.retrieval.questions import parse_strides
from tests.support.tiny import import_golden
from tests.support.warm import run_verb
from tests.unit.evaluation.test_benchmark_runner import StandIn, options

pytest.importorskip("lmms_eval")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
DOCUMENTS = 7


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """ChartQA's stock task, asked as the release asks, over a parquet file made here."""
    import datasets

    from megatron_v2pe.evaluation.lmms.tasks import write_tasks

    folder = tmp_path_factory.mktemp("lmms")
    rows = []
    for number in range(DOCUMENTS):
        content = io.BytesIO()
        Image.new("RGB", (112, 112), (20 * number, 90, 30)).save(content, format="png")
        kind = "human_test" if number % 2 else "augmented_test"
        rows.append(
            {"image": {"bytes": content.getvalue(), "path": None}, "question": f"How many of {number}?"}
            | {"answer": str(10 * number), "type": kind}
        )
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "answer": text, "type": text})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "chartqa.parquet")
    stock = next(path for path in write_tasks(folder / "stock") if "chartqa" in path.name)
    local = stock.read_text().replace("task: v2pe_chartqa", "task: local_chartqa")
    local += (
        f"dataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {folder / 'chartqa.parquet'}}}}}\n"
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local_chartqa.yaml").write_text(local)
    return folder / "tasks"


def table_of(model, tasks):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager, get_task_dict

    found = get_task_dict(
        ["local_chartqa"], TaskManager(include_path=str(tasks), include_defaults=False), "chat"
    )
    model.task_dict = {name: task.dataset for name, task in found.items()}
    results = evaluator.evaluate(
        model, found, bootstrap_iters=0, log_samples=False, distributed_executor_backend="torchrun"
    )["results"]["local_chartqa"]
    return {
        name: value for name, value in results.items() if name.startswith("relaxed") and "stderr" not in name
    }


def answered(questions, out, say):
    settings = parse_strides("2", tokens_per_tile=4)
    job = options(questions, out)
    run_job(find_benchmark("lmms"), settings, StandIn(say), job)


def test_recorded_questions_are_answered_and_replayed(tasks, tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    from megatron_v2pe.evaluation.lmms.model import HarnessModel

    table_of(HarnessModel(record=str(tmp_path / "q")), tasks)
    requests = list(find_benchmark("lmms").requests(tmp_path / "q"))
    assert [request.id for request in requests] == [f"local_chartqa/test/{n}" for n in range(DOCUMENTS)]
    texts = [[part.text for part in request.parts] for request in requests]
    assert texts[3][-1] == "\nHow many of 3? Answer the question using a single word or phrase."
    assert requests[0].max_new_tokens == 100
    assert requests[0].stop == ("\n\n",)

    def half(request):
        number = int(request.id.rpartition("/")[2])
        return str(10 * number) if number % 2 else "-1"

    answered(tmp_path / "q", tmp_path / "out", half)
    right = table_of(HarnessModel(rows=str(tmp_path / "out")), tasks)
    assert right["relaxed_overall,none"] == pytest.approx(3 / 7)
    assert right["relaxed_human_split,none"] == 1
    path = tmp_path / "out" / "rows_2.0.jsonl"
    lines = path.read_text().splitlines()
    random.Random(1).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    assert table_of(HarnessModel(rows=str(tmp_path / "out"), stride="2"), tasks) == right
    path.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DataError, match=rf"has no answer to '{json.loads(lines[0])['id']}' with stride 2"):
        table_of(HarnessModel(rows=str(tmp_path / "out")), tasks)
    with pytest.raises(ConfigError, match="has rows of stride 2, not 4"):
        HarnessModel(rows=str(tmp_path / "out"), stride="4")
    with pytest.raises(ConfigError, match="give one of"):
        HarnessModel()
    with pytest.raises(ConfigError, match="holds recorded questions already"):
        HarnessModel(record=str(tmp_path / "q"))


def test_an_error_is_never_replayed_as_text(tasks, tmp_path, monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    from megatron_v2pe.evaluation.lmms.model import HarnessModel

    table_of(HarnessModel(record=str(tmp_path / "q")), tasks)
    answered(tmp_path / "q", tmp_path / "out", lambda request: Response(id=request.id, error="out of memory"))
    with pytest.raises(DataError, match="ended with an error: out of memory"):
        table_of(HarnessModel(rows=str(tmp_path / "out")), tasks)


@pytest.mark.slow
@pytest.mark.distributed
def test_each_document_once_on_one_and_on_two_ranks(tasks, tmp_path):
    checkpoint = import_golden(tmp_path / "imported")
    tables = {}
    for ranks, sizes in ((1, ()), (2, ("--cp", "2"))):
        out = tmp_path / f"out{ranks}"
        given = ("--tasks", "local_chartqa", "--stride", "2", "--include-path", tasks, "--out", out, *sizes)
        done = run_verb("lmms", checkpoint, *given, ranks=ranks, variables=OFFLINE, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        tables[ranks] = json.loads((out / "results.json").read_text())["results"]["local_chartqa"]
    assert tables[1] == tables[2]
    assert tables[1]["samples"] == DOCUMENTS if "samples" in tables[1] else True
