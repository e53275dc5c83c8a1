"""Groups text, tiling and packing: one altered number of the expected values fails, and only there."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_v2pe.verification.golden.runner import run_groups, select_groups

FOLDER = Path(__file__).parent


def alter(case, path, value):
    *keys, last = path
    for key in keys:
        case = case[key]
    case[last] = value(case[last])


ALTERATIONS = [
    ("tiling", "tiling/grids.json", ("cases", 5, 3), lambda old: old + 1, "grid"),
    ("tiling", "tiling/pixels.json", ("cases", 0, "sha256_float32"), lambda _: "0" * 64, "sha256"),
    (
        "tiling",
        "tiling/pixels.json",
        ("cases", 8, "mean_per_tile_channel", 0, 0),
        lambda x: x + 1,
        "mean_and_std",
    ),
    (
        "text",
        "text/tokenizer.json",
        ("cases", 7, "ids_with_special", 3),
        lambda old: old + 1,
        "ids_with_special",
    ),
    ("text", "text/tokenizer.json", ("cases", 7, "decoded"), lambda old: old + " ", "decoded"),
    ("text", "text/conversations.json", ("cases", 1, "input_ids", 9), lambda old: old + 1, "tokens"),
    ("text", "text/conversations.json", ("cases", 1, "label_spans", 0, 1), lambda old: old - 1, "labels"),
    *(
        (
            "text",
            "text/conversations.json",
            ("cases", number, "label_spans", 0, 0),
            lambda old: old + 1,
            "labels",
        )
        for number in (43, 61, 79)  # Hermes-2 twice, phi3-chat
    ),
    *(
        ("text", "text/tokenizer.json", ("cases", number, "decoded"), lambda old: old + " ", "decoded")
        for number in (120, 170, 220)  # Qwen2, Llama as in Yi, Llama as in Phi-3
    ),
    ("packing", "packing/packs.json", ("cases", 0, "packs", 3, "tokens"), lambda old: old + 1, "packs"),
    ("packing", "text/dataset_items.json", ("cases", 7, "position_runs", 1, 0), lambda x: x + 1, "positions"),
    ("packing", "text/dataset_items.json", ("cases", 7, "label_spans", 0, 0), lambda x: x + 1, "labels"),
    ("packing", "text/dataset_items.json", ("cases", 7, "image_flags", 0), lambda _: 0, "num_tiles"),
]


@pytest.fixture
def copy(tmp_path):
    """A copy of the folders that the three groups read."""
    for name in ("tiling", "text", "packing"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    (tmp_path / "ckpt").mkdir()
    for folder in (FOLDER / "ckpt").iterdir():
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(folder, tmp_path / "ckpt" / folder.name, ignore=weights)
    return tmp_path


@pytest.mark.parametrize(
    ("group", "file", "path", "value", "quantity"),
    ALTERATIONS,
    ids=[f"{row[1]}-{row[4]}-{row[2][1]}" for row in ALTERATIONS],
)
def test_one_altered_number_fails(copy, group, file, path, value, quantity):
    values = json.loads((copy / file).read_text())
    alter(values, path, value)
    (copy / file).write_text(json.dumps(values))
    groups = select_groups(copy, name=group, model_only=False)
    failed = [row for row in run_groups(copy, groups, family=None) if row.status == "fail"]
    assert quantity in {row.quantity for row in failed}
    assert len({row.name for row in failed}) == 1


def test_every_family_is_compared():
    groups = select_groups(FOLDER, name="text", model_only=False)
    rows = list(run_groups(FOLDER, groups, family=None))
    assert {row.status for row in rows} == {"pass"}
    assert {row.name.split("_")[0] for row in rows if "tokenizer" not in row.name} == {
        f"text/{family}" for family in "abcde"
    }


def test_families_without_a_tokenizer_here_are_reported(copy):
    shutil.rmtree(copy / "ckpt" / "b_internlm2_vit6b")
    groups = select_groups(copy, name="text", model_only=False)
    rows = list(run_groups(copy, groups, family=None))
    missing = [row for row in rows if row.status == "unsupported"]
    assert missing
    assert all("b_internlm2_vit6b" in row.name for row in missing)
    only_a = list(run_groups(copy, groups, family="a"))
    assert {row.status for row in only_a} == {"pass"}
