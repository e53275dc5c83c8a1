"""Folders that `convert-hf` writes in transformers 4.57 and 5: nothing missing, the same logits, its processor."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.other_format import convert_hf
from tests.support.hf_folders import FAMILIES_GOLDEN

transformers = pytest.importorskip(
    "transformers", minversion="4.57", reason="extra 'verify' is not installed"
)

KEYS = (
    *("h_qwen3_vit300m", "i_qwen3_vit6b", "j_qwen3moe_vit300m", "l_gptoss_vit300m"),
    "n_internlm2_vit300m",
)
CASE = "packed_v2pe"
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
    """Each document of the pack alone, at its fractional positions; `check-golden` compares ours with these numbers."""
    stored = load_file(FAMILIES_GOLDEN / "forward" / f"{key}.safetensors")
    cases = json.loads((FAMILIES_GOLDEN / "forward" / f"{key}.json").read_text())["cases"]
    (num_tiles,) = [case["sample_num_tiles"] for case in cases if case["name"] == CASE]
    wanted = {
        name: stored[f"{CASE}/{name}"]
        for name in (
            "input_ids",
            "position_ids",
            "cu_seqlens",
            "tile_index",
            "image_flags",
            "logit_rows",
            "logits",
        )
    }
    pixels = stored["pixel_pool"].float()[wanted["tile_index"][wanted["image_flags"] == 1]]
    model, _ = load(folders / key)
    bounds, logits, first = wanted["cu_seqlens"].tolist(), [], 0
    for (start, stop), tiles in zip(pairwise(bounds), num_tiles, strict=True):
        ids = wanted["input_ids"][None, start:stop].long()
        last = first + sum(tiles)
        with torch.no_grad():
            output = model(
                input_ids=ids,
                pixel_values=pixels[first:last] if tiles else None,
                attention_mask=torch.ones_like(ids),
                position_ids=wanted["position_ids"][None, start:stop],
            )
        logits.append(output.logits[0])
        first = last
    assert first == len(pixels)
    error = (torch.cat(logits)[wanted["logit_rows"].long()] - wanted["logits"]).abs().max()
    assert float(error) < LOGITS_ATOL


@pytest.mark.parametrize("key", ["h_qwen3_vit300m", "l_gptoss_vit300m", "n_internlm2_vit300m"])
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
