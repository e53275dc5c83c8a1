"""Tables over seeds: every answer counts once, mean and range, documentation between its marks."""

import json
import sys

import pytest

from tests.unit.quickstart.conftest import QUICKSTART


def fill(work, seed, model, right, report="report"):
    """Answers by (stride, length): so many begin with the right digit, of so many."""
    folder = work / f"seed_{seed}" / model / report
    folder.mkdir(parents=True)
    for (stride, length), (correct, count) in right.items():
        rows = [
            {"length": length, "answer": "7", "prediction": "7" if n < correct else "3"} for n in range(count)
        ]
        with open(folder / f"predictions_{stride}.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def work(tmp_path):
    fill(tmp_path, 0, "random_300", {("1", 512): (3, 3), ("default", 512): (2, 5)})
    fill(tmp_path, 1, "random_300", {("1", 512): (3, 3), ("default", 512): (5, 5)})
    fill(tmp_path, 1, "fixed_8_300", {("default", 512): (0, 4), ("1", 512): (1, 4)})
    return tmp_path


def test_every_answer_counts_once(work):
    import over_seeds

    found = over_seeds.read_accuracies(work)
    assert found["random_300", "default", 512] == {"0": 2 / 5, "1": 1.0}
    assert over_seeds.spread(found["random_300", "default", 512]) == "0.70 (0.40 to 1.00)"
    assert over_seeds.spread(found["fixed_8_300", "1", 512]) == "0.25"


def test_a_right_digit_that_is_repeated_was_found_and_is_counted_beside(work):
    import over_seeds

    path = work / "seed_0" / "random_300" / "report" / "predictions_1.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps({"length": 1024, "answer": "7", "prediction": "7777"}) + "\n")
        file.write(json.dumps({"length": 1024, "answer": "7", "prediction": ""}) + "\n")
    assert over_seeds.read_accuracies(work)["random_300", "1", 1024] == {"0": 0.5}
    asked = over_seeds.read_asked(work, ["random_300"], ["0", "1"])
    assert (asked.num_answers, asked.num_repeated) == (3 + 5 + 2 + 3 + 5, 1)
    asked = over_seeds.Asked(num_seeds=2, questions=[20, 40, 15], num_answers=1725, num_repeated=20)
    text = " ".join(asked.caption().split())
    assert "over 2 seeds" in text
    assert "20, 40 and 15 questions" in text
    alone = over_seeds.Asked(num_seeds=1, questions=[20], num_answers=60, num_repeated=0).caption()
    assert alone.startswith("Accuracy over 1 seed; guessing")
    assert "20 of 1,725 answers begin with the right one and repeat it" in text


def test_steps_are_listed_from_the_largest(work):
    import over_seeds

    fill(
        work,
        5,
        "random_300",
        {("1", 512): (1, 1), ("default", 512): (1, 1), ("16", 512): (1, 1), ("8", 512): (1, 1)},
    )
    strides = list(over_seeds._answers(work / "seed_5" / "random_300" / "report"))
    assert strides == ["default", "16", "8", "1"]


def test_table_picture_and_values(work, capsys, monkeypatch):
    import over_seeds

    monkeypatch.setattr(sys, "argv", ["over_seeds.py", str(work), "--model", "random_300"])
    over_seeds.main()
    shown = capsys.readouterr().out
    assert "2 seeds: mean (worst to best)" in shown
    assert "64/64 (default)  0.70 (0.40 to 1.00)" in shown
    assert (work / "seeds.txt").read_text() == shown
    assert (work / "seeds.csv").read_text().splitlines()[1] == "random_300,default,512,0,0.4000"
    assert (work / "seeds.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["over_seeds.py", str(work), "--model", "random_5"])
    with pytest.raises(SystemExit, match="no run named random_5"):
        over_seeds.main()


def test_the_ablation_has_a_row_for_each_training_and_step(work, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART.parent / "ablation"))
    import figure

    arguments = ["figure.py", str(work), "--models", "random_300", "fixed_8_300"]
    monkeypatch.setattr(sys, "argv", arguments)
    figure.main()
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows[2:]] == [
        ["random", "64/64 (default)", "1.00"],  # of seed 1 alone: the other model has no more
        ["random", "1/64", "1.00"],
        ["fixed 8/64", "64/64 (default)", "0.00"],
        ["fixed 8/64", "1/64", "0.25"],
    ]
    assert (work / "ablation.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*arguments, "default_300"])
    with pytest.raises(SystemExit, match="no finished run named default_300"):
        figure.main()
    fill(work, 2, "default_300", {("1", 512): (1, 4)})
    with pytest.raises(SystemExit, match="no seed has a finished run of every model"):
        figure.main()


def test_the_ablations_documentation_says_how_much_was_asked(work, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(QUICKSTART.parent / "ablation"))
    import figure

    monkeypatch.setattr(figure, "README", tmp_path / "page.md")
    monkeypatch.setattr(figure, "PICTURE", tmp_path / "ablation.png")
    (tmp_path / "page.md").write_text("<!-- ablation figures: begin -->\n<!-- ablation figures: end -->\n")
    monkeypatch.setattr(sys, "argv", ["figure.py", str(work), "--models", "random_300", "--docs"])
    figure.main()
    page = (tmp_path / "page.md").read_text()
    assert "Accuracy over 2 seeds" in page
    assert "| random | 1/64 | 1.00 (1.00 to 1.00) |" in page
    assert (tmp_path / "ablation.png").exists()


def test_documentation_is_replaced_between_its_marks(tmp_path):
    import over_seeds

    page = tmp_path / "README.md"
    page.write_text("a\n<!-- figures: begin (by hand) -->\nold\n<!-- figures: end -->\nb\n")
    over_seeds.replace_between_marks(page, "figures", over_seeds.markdown(["x", "y"], [["1", "2"]]))
    assert page.read_text() == (
        "a\n<!-- figures: begin (by hand) -->\n| x | y |\n| --- | --- |\n| 1 | 2 |\n<!-- figures: end -->\nb\n"
    )
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="does not have the two comments"):
        over_seeds.replace_between_marks(page, "figures", "x")


def test_documents_have_the_marks():
    import over_seeds

    for page in over_seeds.READMES:
        assert page.read_text(encoding="utf-8").count("<!-- quickstart figures: ") == 2
    readme = QUICKSTART.parent / "ablation" / "README.md"
    assert readme.read_text(encoding="utf-8").count("<!-- ablation figures: ") == 2
