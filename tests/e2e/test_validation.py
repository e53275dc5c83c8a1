"""Loss of held-out data while training: weighted as training, the same on every layout; training does not change."""

import json

import numpy as np
import pytest

from megatron_v2pe.cli.main import main
from tests.support import tiny

KEYS = ("validation_loss", "validation_loss_by_source", "validation_loss_by_length")
ASKED = ("retrieval_accuracy", "retrieval_accuracy_by_source", "retrieval_accuracy_by_length")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A run with two held-out sets of 9 samples in several packs, validated every second of five steps."""
    root = tmp_path_factory.mktemp("validation")
    config = tiny.prepared(root, run="single")
    held_out = tiny.make_data(root / "held_out", num_samples=9, seed=5, num_sets=2)
    asked = tiny.make_data(root / "asked", num_samples=7, seed=0)
    given = [f"data.validation={held_out}", "runtime.validate_every=2"]
    given += [f"data.retrieval={asked}", "runtime.evaluate_every=4"]
    tiny.train(config, given)
    return root, config, held_out, given


def held_out_lines(run_dir):
    return {
        line["step"]: {key: line[key] for key in KEYS} for line in tiny.metrics(run_dir) if KEYS[0] in line
    }


def test_it_is_due_every_so_many_steps_and_at_the_end(setup):
    root, *_ = setup
    lines = held_out_lines(root / "single")
    assert list(lines) == [2, 4, 5]
    assert set(lines[5]["validation_loss_by_source"]) == {"tiny", "tiny/1"}
    assert list(lines[5]["validation_loss_by_length"]) == ["up_to_1024"]
    assert lines[5]["validation_loss_by_length"]["up_to_1024"] == pytest.approx(lines[5]["validation_loss"])
    assert lines[5]["validation_loss"] < lines[2]["validation_loss"]


def test_questions_are_asked_every_so_many_steps_and_at_the_end(setup):
    root, *_ = setup
    lines = {line["step"]: line for line in tiny.metrics(root / "single") if ASKED[0] in line}
    assert list(lines) == [4, 5]
    assert 0 <= lines[5]["retrieval_accuracy"] <= 1
    assert list(lines[5]["retrieval_accuracy_by_source"]) == ["tiny"]
    assert list(lines[5]["retrieval_accuracy_by_length"]) == ["up_to_1024"]


def test_training_does_not_notice(setup, tmp_path):
    root, config, *_ = setup
    tiny.train(config, [f"runtime.run_dir={tmp_path / 'without'}"])
    assert tiny.curve(tmp_path / "without") == tiny.curve(root / "single")


def test_the_loss_is_that_of_a_step_on_the_same_samples(setup, tmp_path):
    """One pack of all held-out samples, at weights that a rate of 1e-30 leaves alone; float32 sums of other packs."""
    _, config, held_out, given = setup
    still = ["optim.lr=1e-30", "optim.steps=1", "optim.warmup_steps=0", "optim.global_batch_size=1"]
    tiny.train(config, [*given, *still, "runtime.validate_every=1", f"runtime.run_dir={tmp_path / 'a'}"])
    one_pack = ["data.max_pack_tokens=8000", f"data.meta={held_out}", f"runtime.run_dir={tmp_path / 'b'}"]
    tiny.train(config, [*still, *one_pack])
    (line,), (wanted,) = tiny.metrics(tmp_path / "a"), tiny.metrics(tmp_path / "b")
    assert wanted["samples"] == 9
    assert line["validation_loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    for name, loss in wanted["loss_by_source"].items():
        assert line["validation_loss_by_source"][name] == pytest.approx(loss, rel=1e-6)


# The pipeline with virtual stages and the odd packs of dp are the ones that could differ most.
LAYOUTS = [
    pytest.param(["parallel.cp=2"], id="cp2", marks=pytest.mark.slow),
    pytest.param(["parallel.tp=2", "parallel.sequence_parallel=true"], id="tp2sp", marks=pytest.mark.slow),
    pytest.param(["parallel.pp=2"], id="pp2", marks=pytest.mark.slow),
    pytest.param(["parallel.pp=2", "parallel.vpp=2", "parallel.pipeline_layout=E|t|t|L"], id="vpp2"),
    pytest.param([], id="dp2"),
]


@pytest.mark.distributed
@pytest.mark.parametrize("overrides", LAYOUTS)
def test_every_layout_has_the_same_losses(setup, overrides, tmp_path):
    """After five updates in float32, whose sums have another order: 1e-5 relative, as for training's own loss."""
    root, config, _, given = setup
    tiny.train(config, [*given, *overrides, f"runtime.run_dir={tmp_path}"], ranks=2)
    found, wanted = held_out_lines(tmp_path), held_out_lines(root / "single")
    assert list(found) == list(wanted)
    for step, line in wanted.items():
        for key in KEYS[1:]:
            assert list(found[step][key]) == list(line[key])
            np.testing.assert_allclose(list(found[step][key].values()), list(line[key].values()), rtol=1e-5)


LEARNT = ["optim.lr=1e-2", "optim.steps=40", "optim.global_batch_size=2", "data.loss_reduction=token"]


@pytest.fixture(scope="module")
def learnt(setup):
    """One text question, learnt by heart, and another one, never seen."""
    root, config, *_ = setup
    folder = root / "learnt"
    folder.mkdir()
    entries = {}
    for name, text in (("known", "a small red square"), ("unknown", "the page has a number on it")):
        turns = [{"from": "human", "value": f"What is {name}?"}, {"from": "gpt", "value": text}]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": n, "conversations": turns}) + "\n" for n in range(3)))
        entries[name] = {"annotation": str(path), "root": str(folder), "repeat_time": 1}
        entries[name] |= {"length": 3, "data_augment": False}
    (folder / "train.json").write_text(json.dumps({"known": entries["known"]}))
    (folder / "asked.json").write_text(json.dumps(entries))
    given = [f"data.meta={folder / 'train.json'}", f"data.retrieval={folder / 'asked.json'}"]
    return config, [*given, "runtime.evaluate_every=40", "data.max_pack_tokens=128", *LEARNT]


def accuracies(config, given, run_dir, **ranks):
    tiny.train(config, [*given, f"runtime.run_dir={run_dir}", "data.max_sample_tokens=128"], **ranks)
    return tiny.metrics(run_dir)[-1]["retrieval_accuracy_by_source"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["parallel.tp=2", "parallel.sequence_parallel=true"], id="tp2sp", marks=pytest.mark.slow
        ),
        pytest.param(["parallel.cp=2"], id="cp2", marks=pytest.mark.slow),
        pytest.param(
            ["parallel.pp=2", "parallel.vpp=2", "parallel.pipeline_layout=E|t|t|L"],
            id="vpp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_was_learnt_by_heart_is_right_on_every_layout(learnt, overrides, tmp_path):
    config, given = learnt
    wanted = {"known": 1.0, "unknown": 0.0}
    assert accuracies(config, [*given, *overrides], tmp_path / "two", ranks=2) == wanted


def test_what_was_learnt_by_heart_is_right(learnt, tmp_path):
    config, given = learnt
    assert accuracies(config, given, tmp_path / "one") == {"known": 1.0, "unknown": 0.0}


def test_runs_shows_it(setup, capsys):
    root, *_ = setup
    assert main(["runs", str(root / "single")]) == 0
    out = capsys.readouterr().out
    assert "held-out loss" in out
    assert "in 3 validations" in out
    assert "held-out, tiny/1" in out
    assert "in 2 evaluations, best" in out


def test_an_unreadable_image_of_held_out_data_is_named(setup, tmp_path, capsys):
    _, config, *_ = setup
    copy = tiny.make_data(tmp_path / "copy", num_samples=9, seed=5)
    common = ["train", str(config), f"data.validation={copy}", "runtime.validate_every=1"]
    lines = [json.loads(line) for line in (tmp_path / "copy" / "train.jsonl").read_text().splitlines()]
    image = next(line["image"] for line in lines if "image" in line)
    broken = tmp_path / "copy" / (image if isinstance(image, str) else image[0])
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\x00" * 40  # found when it is decoded, not before
    broken.write_bytes(content)
    assert main([*common, f"runtime.run_dir={tmp_path / 'run'}"]) == 2
    assert f"data.validation: {broken}" in capsys.readouterr().err
    assert main([*common[:2], f"data.validation={copy}"]) == 2
    assert "give both, or neither" in capsys.readouterr().err
