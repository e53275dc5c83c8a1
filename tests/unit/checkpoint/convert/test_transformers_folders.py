"""Folders that `convert-hf` writes, in transformers 5 itself: nothing missing, the same logits, its processor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.other_format import convert_hf
from tests.support.hf_folders import FAMILIES_GOLDEN

transformers = pytest.importorskip("transformers", minversion="5.0", reason="extra 'verify' is not installed")

KEYS = ("h_qwen3_vit300m", "i_qwen3_vit6b", "j_qwen3moe_vit300m", "n_internlm2_vit300m")
CASE = "default_multi"
LOGITS_ATOL = 1e-4  # float32 logits of order 10, against a float64 run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    for key in KEYS:
        convert_hf(FAMILIES_GOLDEN / "ckpt" / key, root / key)
    return root


def load(folder):
    return transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )


@pytest.mark.parametrize("key", KEYS)
def test_every_name_is_known_and_none_is_missing(folders, key):
    _, report = load(folders / key)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("n_")])
def test_logits_are_the_recorded_ones_which_ours_equal(folders, key):
    """`check-golden` compares ours with the same numbers."""
    stored = load_file(FAMILIES_GOLDEN / "forward" / f"{key}.safetensors")
    wanted = {
        name.removeprefix(f"{CASE}/"): value
        for name, value in stored.items()
        if name.startswith(f"{CASE}/") and "grad/" not in name
    }
    pixels = stored["pixel_pool"].float()[wanted["tile_index"][wanted["image_flags"] == 1]]
    model, _ = load(folders / key)
    ids = wanted["input_ids"].long()[None]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
    assert float((logits[wanted["logit_rows"].long()] - wanted["logits"]).abs().max()) < LOGITS_ATOL


@pytest.mark.parametrize("key", ["h_qwen3_vit300m", "n_internlm2_vit300m"])
def test_the_processor_makes_the_recorded_ids(folders, key):
    """transformers' processor on a converted folder; it needs torchvision."""
    pytest.importorskip("torchvision", reason="transformers' processor for videos needs it")
    processor = transformers.AutoProcessor.from_pretrained(folders / key)
    assert type(processor).__name__ == "InternVLProcessor"
    cases = json.loads((FAMILIES_GOLDEN / "text" / "hf_processor.json").read_text())["cases"]
    (case,) = [case for case in cases if case["ckpt"] == key]
    text = processor.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False)
    assert text == case["rendered"]
    width, height = case["image"]
    image = Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
    made = processor(images=[image], text=[text], return_tensors="pt")
    assert made["input_ids"][0].tolist() == case["input_ids"]
    assert len(made["pixel_values"]) == case["num_tiles"]
