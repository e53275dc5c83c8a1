"""Groups text, tiling and packing: one altered number of the expected values fails, and only there."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_v2pe.verification.golden.runner import run_groups, select_groups

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alteration:
    """One number of one expected case.

    Attributes:
        file: json file of cases.
        case: fields that only this case has with these values; a case that is a list has the file's columns.
        path: keys from the case to the number.
        change: old number to new.
        quantity: what has to fail.
    """

    file: str
    case: dict
    path: tuple
    change: Callable
    quantity: str

    @property
    def group(self):
        return "packing" if self.file == "text/dataset_items.json" else self.file.partition("/")[0]

    def __str__(self):
        return "-".join([self.file, *map(str, self.case.values()), self.quantity])

    def apply(self, folder):
        values = json.loads((folder / self.file).read_text())
        (case,) = [case for case in values["cases"] if self._is_meant(case, values.get("columns"))]
        *keys, last = self.path
        for key in keys:
            case = case[key]
        if isinstance(case, list) and isinstance(last, str):
            last = values["columns"].index(last)
        case[last] = self.change(case[last])
        (folder / self.file).write_text(json.dumps(values))

    def _is_meant(self, case, columns):
        fields = dict(zip(columns, case, strict=True)) if isinstance(case, list) else case
        return all(_field(fields, name) == value for name, value in self.case.items())


def _field(fields, name):
    """Value of a dotted name, None where a part of it is missing."""
    for key in name.split("."):
        fields = fields.get(key) if fields is not None else None
    return fields


def plus_one(old):
    return old + 1


GRID = {"width": 896, "height": 448, "setting_index": 0}
OLD_MILL = {"ckpt": "a_internlm2_vit300m", "text": "The river runs past the old mill"}
ITEM = {"ckpt": "a_internlm2_vit300m", "version": "v2pe_fix", "item.image": "image_1.png"}


def conversation(ckpt):
    return {"ckpt": ckpt, "record": "single_image_prefix", "pad_to_max_length": False}


def pixels(**fields):
    return {"image": "image_0.png", "normalize": "imagenet", **fields}


ALTERATIONS = [
    Alteration(file="tiling/grids.json", case=GRID, path=("grid_cols",), change=plus_one, quantity="grid"),
    Alteration(
        file="tiling/pixels.json",
        case=pixels(image_size=56),
        path=("sha256_float32",),
        change=lambda _: "0" * 64,
        quantity="sha256",
    ),
    Alteration(
        file="tiling/pixels.json",
        case=pixels(image_size=448),
        path=("mean_per_tile_channel", 0, 0),
        change=plus_one,
        quantity="mean_and_std",
    ),
    Alteration(
        file="text/tokenizer.json",
        case=OLD_MILL,
        path=("ids_with_special", 3),
        change=plus_one,
        quantity="ids_with_special",
    ),
    *(
        Alteration(
            file="text/tokenizer.json",
            case=case,
            path=("decoded",),
            change=lambda old: old + " ",
            quantity="decoded",
        )
        for case in (
            OLD_MILL,
            {"ckpt": "c_qwen2_vit300m", "text": " <img> "},
            {"ckpt": "d_llama_vit6b", "text": " <img> "},  # Llama as in Yi
            {"ckpt": "e_phi3_vit300m", "text": " <img> "},  # Llama as in Phi-3
        )
    ),
    Alteration(
        file="text/conversations.json",
        case=conversation("a_internlm2_vit300m"),
        path=("input_ids", 9),
        change=plus_one,
        quantity="tokens",
    ),
    *(
        Alteration(
            file="text/conversations.json",
            case=conversation(ckpt),
            path=("label_spans", 0, 0),
            change=plus_one,
            quantity="labels",
        )
        for ckpt in ("a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
    ),
    Alteration(
        file="packing/packs.json",
        case={"name": "basic"},
        path=("packs", 3, "tokens"),
        change=plus_one,
        quantity="packs",
    ),
    Alteration(
        file="text/dataset_items.json",
        case=ITEM,
        path=("position_runs", 1, 0),
        change=plus_one,
        quantity="positions",
    ),
    Alteration(
        file="text/dataset_items.json",
        case=ITEM,
        path=("label_spans", 0, 0),
        change=plus_one,
        quantity="labels",
    ),
    Alteration(
        file="text/dataset_items.json",
        case=ITEM,
        path=("image_flags", 0),
        change=lambda _: 0,
        quantity="num_tiles",
    ),
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


@pytest.mark.parametrize("alteration", ALTERATIONS, ids=str)
def test_one_altered_number_fails(copy, alteration):
    alteration.apply(copy)
    groups = select_groups(copy, name=alteration.group, model_only=False)
    failed = [row for row in run_groups(copy, groups, family=None) if row.status == "fail"]
    assert alteration.quantity in {row.quantity for row in failed}
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
