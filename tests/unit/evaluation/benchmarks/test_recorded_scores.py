"""Scores that others recorded for their own predictions, reproduced (tests/golden/scores/README.md)."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.sets.milebench import MileBench
from megatron_v2pe.evaluation.benchmarks.sets.mm_niah import MMNIAH
from megatron_v2pe.evaluation.jobs.report import score_folder, without_duplicates

FOLDER = Path(__file__).parents[3] / "golden" / "scores"
NIAH, SETS = ("reasoning-text", "retrieval-image"), ("ActionSequence", "WikiVQA", "ALFRED", "MMCoQA")


def unpacked(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_bytes(gzip.decompress((FOLDER / f"{name}.jsonl.gz").read_bytes()))
    return tmp_path


@pytest.fixture
def niah(tmp_path):
    return unpacked(tmp_path, NIAH)


def test_mm_niah_equals_every_recorded_bin(niah):
    (found,) = score_folder(MMNIAH(), niah, mode="release")
    for task in NIAH:
        recorded = json.loads((FOLDER / f"{task}.scores.json").read_text())
        assert found.score.by_length[task] == pytest.approx(recorded[f"{task}-test"], abs=1e-6)
        assert found.score.metrics[task] == pytest.approx(recorded["average"], abs=1e-6)
        assert found.score.metrics[f"{task} (micro)"] == pytest.approx(recorded["weighted_avg_acc"], abs=1e-9)
        counts = [
            sum(c.count for c in found.score.cells if c.group == task and c.length == length)
            for length in found.score.lengths
        ]
        assert counts == recorded["sample_number_array"]


def test_the_original_scorer_differs_on_reasoning_text_alone(niah):
    (found,) = score_folder(MMNIAH(), niah, mode="original")
    assert found.score.metrics["reasoning-text"] == pytest.approx(0.492680, abs=1e-6)
    recorded = json.loads((FOLDER / "retrieval-image.scores.json").read_text())
    assert found.score.metrics["retrieval-image"] == pytest.approx(recorded["average"], abs=1e-6)


def test_duplicates_are_refused_kept_or_dropped(niah, capsys):
    path = niah / "retrieval-image.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    twice = {**rows[0], "response": "A" if rows[0]["answer"] else "B"}  # wrong this time
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, twice, twice]))
    assert main(["score", "mm-niah", str(niah)]) == 2
    assert (
        f"'retrieval-image/{rows[0]['question_id']}' has two answers (2 rows too many"
        in capsys.readouterr().err
    )
    counts = {
        how: score_folder(MMNIAH(), niah, mode="release", duplicates=how)[0].num_rows
        for how in ("keep", "drop")
    }
    assert counts["keep"] == counts["drop"] + 2
    kept = without_duplicates(MMNIAH().recorded(path), "drop")
    assert next(row for row in kept if row.id.endswith(f"/{twice['question_id']}")).text == twice["response"]


def test_recorded_answers_without_a_response_are_errors(tmp_path, capsys):
    row = {"question_id": 1, "answer": 0, "response": None, "context_length": 1500, "placed_depth": 0.5}
    good = {**row, "question_id": 2, "response": "A"}
    (tmp_path / "retrieval-image.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(good) + "\n")
    assert main(["score", "mm-niah", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert "1 questions ended with an error" in out.err
    assert "retrieval-image (clean mean)  100.0000" in out.out


def milebench(folder, rule):
    (found,) = score_folder(MileBench(rule), folder, mode="release")
    return found.score


def test_milebench_equals_every_recorded_set(tmp_path):
    score = milebench(unpacked(tmp_path, SETS), "fork")
    for name in SETS:
        recorded = json.loads((FOLDER / f"{name}.eval.json").read_text())
        assert score.metrics[name] == pytest.approx(next(iter(recorded.values())), abs=1e-9)
    assert score.metrics["T"] == score.metrics["ActionSequence"]
    assert score.metrics["S"] == pytest.approx(
        sum(score.metrics[n] for n in ("WikiVQA", "ALFRED", "MMCoQA")) / 3
    )


def test_the_one_answer_of_wikivqa_that_the_first_letter_rule_reads_differently(tmp_path):
    """The folder was recorded after the rule had been changed: one answer of 200 begins with a letter and continues."""
    folder = unpacked(tmp_path, ["WikiVQA"])
    values = {rule: milebench(folder, rule) for rule in ("release", "single", "fork")}
    assert [values[rule].metrics["WikiVQA"] for rule in values] == pytest.approx(
        [0.75, 0.755, 0.755], abs=1e-9
    )
    differ = [n for n, value in values["release"].rows.items() if value != values["fork"].rows[n]]
    assert len(differ) == 1


def test_recorded_values_are_compared_with_every_rule(tmp_path):
    folder = unpacked(tmp_path, SETS)
    for name in SETS:
        (folder / f"{name}.eval.json").write_bytes((FOLDER / f"{name}.eval.json").read_bytes())
    notes = milebench(folder, "single").notes
    assert "letter rule 'fork' gives 4 of 4 recorded values" in notes
    assert "letter rule 'release' gives 3 of 4 recorded values (not WikiVQA 75.50, here 75.00)" in notes
    (folder / "reasoning-text.jsonl").write_bytes(
        gzip.decompress((FOLDER / "reasoning-text.jsonl.gz").read_bytes())
    )
    (folder / "reasoning-text.scores.json").write_bytes((FOLDER / "reasoning-text.scores.json").read_bytes())
    (found,) = score_folder(MMNIAH(), folder, mode="original")
    assert "reasoning-text: recorded bins differ by at most 0.05" in found.score.notes


def test_each_extracted_letter_is_the_recorded_one(tmp_path):
    folder = unpacked(tmp_path, ["ActionSequence", "WikiVQA"])
    score = milebench(folder, "fork")
    for name in ("ActionSequence", "WikiVQA"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert score.rows[f"{name}/{row['sample_id']}"] == row["result"]


def test_a_folder_without_predictions_is_named(tmp_path, capsys):
    assert main(["score", "mm-niah", str(tmp_path)]) == 2
    assert "holds neither benchmark.json" in capsys.readouterr().err
    assert main(["score", "mm-nia", str(tmp_path)]) == 2
    assert "did you mean mm-niah?" in capsys.readouterr().err
    assert main(["score", "milebench", str(tmp_path), "--letters", "first"]) == 2
    assert "one of release, single, fork" in capsys.readouterr().err
    assert main(["score", "milebench", str(tmp_path), "--mode", "original"]) == 2
    assert "scored in release, clean" in capsys.readouterr().err


def test_a_wrong_line_is_named_by_key(tmp_path):
    (tmp_path / "counting-text.jsonl").write_text('{"question_id": 1, "answer": "[1]", "response": "x"}\n')
    with pytest.raises(DataError, match=r"counting-text.jsonl:1: key 'context_length' is missing"):
        MMNIAH().recorded(tmp_path)
