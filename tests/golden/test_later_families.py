"""check-golden on the committed cases of InternVL2.5 to 3.5: they pass, and an altered number fails alone."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.cli.main import main
from megatron_v2pe.verification.golden.runner import run_groups, select_groups
from tests.support.hf_folders import FAMILIES_GOLDEN

KEY, CASE = "j_qwen3moe_vit300m", "packed_v2pe"


def rows_of(folder, group):
    return list(run_groups(folder, select_groups(folder, name=group, model_only=False), family=None))


@pytest.mark.parametrize("group", ["text", "tiling", "formats", "model", "generation"])
def test_the_committed_cases_pass(group):
    rows = rows_of(FAMILIES_GOLDEN, group)
    assert [row for row in rows if row.status != "pass"] == []
    assert rows


@pytest.fixture
def copy(tmp_path):
    """The packed case of the mixture of experts alone."""
    shutil.copytree(FAMILIES_GOLDEN / "ckpt" / KEY, tmp_path / "ckpt" / KEY)
    (tmp_path / "forward").mkdir()
    for suffix in ("json", "safetensors"):
        shutil.copy(FAMILIES_GOLDEN / "forward" / f"{KEY}.{suffix}", tmp_path / "forward")
    path = tmp_path / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    values["cases"] = [case for case in values["cases"] if case["name"] == CASE]
    path.write_text(json.dumps(values))
    return tmp_path


def add_to_logits(folder):
    path = folder / "forward" / f"{KEY}.safetensors"
    tensors = load_file(path)
    tensors[f"{CASE}/router_logits_1"][3, 2] += 1e-3
    save_file(tensors, path)


def move_a_token(folder):
    path = folder / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    tokens = values["cases"][0]["tokens_per_expert"]["1"]
    tokens[0], tokens[1] = tokens[0] + 1, tokens[1] - 1
    path.write_text(json.dumps(values))


def add_to_the_loss(folder):
    path = folder / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    losses = values["cases"][0]["aux_loss_per_layer"]
    losses["1" if isinstance(losses, dict) else 1] += 1e-3
    path.write_text(json.dumps(values))


def add_to_a_gradient(folder):
    path = folder / "forward" / f"{KEY}.safetensors"
    tensors = load_file(path)
    gradient = tensors[f"{CASE}/aux_grad/language_model.model.layers.0.mlp.gate.weight"]
    gradient[3, 5] += 1e-3 * gradient.abs().max()
    save_file(tensors, path)


def advance_a_position(folder):
    path = folder / "forward" / f"{KEY}.safetensors"
    tensors = load_file(path)
    tensors[f"{CASE}/position_ids"][20] += 1 / 256
    save_file(tensors, path)


def scaled(quantity, parameter=None):
    """A change of a number of the case's json by a thousandth."""

    def alter(folder):
        path = folder / "forward" / f"{KEY}.json"
        values = json.loads(path.read_text())
        case = values["cases"][0]
        if parameter is None:
            case[quantity] *= 1.001
        else:
            case[quantity][parameter] *= 1.001
        path.write_text(json.dumps(values))

    return alter


def lengthen_a_document(folder):
    path = folder / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    values["cases"][0]["sample_lengths"][1] += 1
    path.write_text(json.dumps(values))


GATE = "language_model.model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("alter", "quantity"),
    [
        (add_to_logits, "router_logits_1"),
        (move_a_token, "tokens_per_expert_1"),
        (add_to_the_loss, "aux_loss_per_layer"),
        (scaled("aux_loss"), "aux_loss"),
        (scaled("aux_grad_l2", GATE), "aux_grad_l2"),
        (add_to_a_gradient, "aux_grad"),
        (scaled("grad_l2", GATE), "grad_l2"),
        (advance_a_position, "position_ids"),
        (lengthen_a_document, "sizes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_altered_number_fails(copy, alter, quantity):
    alter(copy)
    failed = [row for row in rows_of(copy, "model") if row.status == "fail"]
    assert [(row.name, row.quantity) for row in failed] == [(f"model/{KEY}/{CASE}", quantity)]


def altered_tensor(folder):
    path = folder / "ckpt_hf" / KEY / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})


def renamed_pattern(folder):
    path = folder / "names.json"
    path.write_text(path.read_text().replace("lambda_1", "lambda_3"))


def other_rotation(folder):
    """The weights are the same, the model is another."""
    path = folder / "ckpt_hf" / KEY / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["rope_theta"] *= 2
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("alter", "quantities"),
    [
        (other_rotation, ["architecture"]),
        (altered_tensor, ["github to native", "native to github"]),
        (renamed_pattern, ["names"]),
    ],
)
def test_another_bit_or_name_of_the_other_format_fails(tmp_path, alter, quantities):
    for part in ("ckpt", "ckpt_hf"):
        shutil.copytree(FAMILIES_GOLDEN / part / KEY, tmp_path / part / KEY)
    (tmp_path / "forward").mkdir()
    shutil.copy(FAMILIES_GOLDEN / "forward" / f"{KEY}.json", tmp_path / "forward")
    shutil.copy(FAMILIES_GOLDEN / "names.json", tmp_path)
    alter(tmp_path)
    failed = [row for row in rows_of(tmp_path, "formats") if row.status == "fail"]
    assert [row.quantity for row in failed] == quantities


def test_an_altered_number_of_gpt_oss_fails(tmp_path):
    """A gradient of the sinks, an end token as it was meant, and the window of its config.json."""
    for part in ("ckpt", "forward", "text"):
        shutil.copytree(FAMILIES_GOLDEN / part, tmp_path / part)
    key = "l_gptoss_vit300m"
    forward, text = tmp_path / "forward" / f"{key}.json", tmp_path / "text" / "conversations.json"
    values = json.loads(forward.read_text())
    values["cases"][0]["grad_l2"]["language_model.model.layers.2.self_attn.sinks"] *= 1.001
    forward.write_text(json.dumps(values))
    table = json.loads(text.read_text())
    case = next(case for case in table["cases"] if case.get("intended_input_ids"))
    case["intended_input_ids"][-1] += 5  # <|end|> in the place of <|return|>
    text.write_text(json.dumps(table))

    def failed(group):
        groups = select_groups(tmp_path, name=group, model_only=False)
        return [row.quantity for row in run_groups(tmp_path, groups, family=key) if row.status == "fail"]

    assert failed("model") == ["grad_l2"]
    assert failed("text") == ["tokens"]


def test_another_window_is_another_model(tmp_path):
    shutil.copytree(FAMILIES_GOLDEN / "ckpt" / "l_gptoss_vit300m", tmp_path / "ckpt" / "l_gptoss_vit300m")
    shutil.copytree(FAMILIES_GOLDEN / "forward", tmp_path / "forward")
    config = tmp_path / "ckpt" / "l_gptoss_vit300m" / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 8', '"sliding_window": 9'))
    groups = select_groups(tmp_path, name="model", model_only=False)
    failed = {row.quantity for row in run_groups(tmp_path, groups, family="l_gptoss") if row.status == "fail"}
    assert {"logits", "router_logits_1", "grad"} <= failed
    assert "router_logits_0" in failed  # after the first layer's attention


def test_a_native_folder_alone_is_checked_against_itself(tmp_path):
    shutil.copytree(FAMILIES_GOLDEN / "ckpt_hf" / KEY, tmp_path / "ckpt_hf" / KEY)
    rows = rows_of(tmp_path, "formats")
    assert [row.status for row in rows] == ["pass"] * 3
    assert [row.quantity for row in rows] == [
        "native, ours, native",
        "architecture",
        "native, github, native",
    ]


def test_what_cannot_be_run_is_said(tmp_path, capsys):
    """Cases without their weights or their native folder, and a folder of which nothing was run."""
    for part in ("forward", "text"):
        shutil.copytree(FAMILIES_GOLDEN / part, tmp_path / part)
    rows = rows_of(tmp_path, "model")
    assert {row.status for row in rows} == {"unsupported"}
    assert [row.name for row in rows] == [
        f"model/{path.stem}" for path in sorted(tmp_path.glob("forward/*.json"))
    ]
    found = [row for row in rows_of(tmp_path, "text") if row.name.startswith("text/processor_")]
    assert {(row.status, row.detail) for row in found} == {
        ("unsupported", f"the folder has no ckpt_hf/{key}")
        for key in ("h_qwen3_vit300m", "l_gptoss_vit300m", "n_internlm2_vit300m")
    }
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "conversations.json").write_text('{"records": [], "cases": []}')
    assert main(["check-golden", str(tmp_path), "--group", "text"]) == 2
    assert "no case of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--ep", "3"],
            f"{KEY}: parallel.ep is 3, but must divide the 8 experts of a layer; possible: 1, 2, 4, 8",
        ),
        (["--tp", "3"], "h_qwen3_vit300m: parallel.tp is 3, but must divide the 4 attention heads"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_ranks_are_started(capsys, options, words):
    assert main(["check-golden", str(FAMILIES_GOLDEN), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_grid_a_separator_and_an_id_altered_fail(tmp_path):
    for part in ("preprocess", "text", "ckpt", "ckpt_hf"):
        shutil.copytree(FAMILIES_GOLDEN / part, tmp_path / part)
    grids = json.loads((tmp_path / "preprocess" / "tiles.json").read_text())
    grids["cases"][0]["hf"][0] += 1
    (tmp_path / "preprocess" / "tiles.json").write_text(json.dumps(grids))
    assert [row.quantity for row in rows_of(tmp_path, "tiling") if row.status == "fail"] == ["grid of hf"]
    templates = json.loads((tmp_path / "text" / "templates.json").read_text())
    templates["internvl2_5"]["stop_token"] = "<|end|>"
    (tmp_path / "text" / "templates.json").write_text(json.dumps(templates))
    processor = json.loads((tmp_path / "text" / "hf_processor.json").read_text())
    (case,) = [case for case in processor["cases"] if case["ckpt"].startswith("n_")]
    case["input_ids"][3] += 1
    (tmp_path / "text" / "hf_processor.json").write_text(json.dumps(processor))
    failed = [row.quantity for row in rows_of(tmp_path, "text") if row.status == "fail"]
    assert failed == ["stop_token", "input_ids"]
