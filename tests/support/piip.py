"""The golden checkpoint with a small pyramid around its vision tower."""

from pathlib import Path

import yaml

from megatron_v2pe.checkpoint.convert.add_pyramid import add_pyramid
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from tests.support.tiny import GOLDEN_HF

RECIPE = {
    "branches": [
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 192,  # 12 x 12 patches beside the large branch's 8 x 8
            "patch_size": 16,
            "weights": "random",
        },
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 224,
            "patch_size": 16,
            "weights": "random",
        },
    ],
    "interactions": 2,
    "deform_num_heads": 4,
}


def write_recipe(path: Path, **changes: object) -> Path:
    """The recipe above with other values; `branch0={...}` changes keys of a branch."""
    recipe = {**RECIPE, "branches": [dict(branch) for branch in RECIPE["branches"]]}
    for key, value in changes.items():
        if key.startswith("branch") and key != "branches":
            recipe["branches"][int(key.removeprefix("branch"))].update(value)
        else:
            recipe[key] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def pyramid_folder(folder: Path, **changes: object) -> Path:
    """Hugging Face folder of the golden model with a pyramid."""
    add_pyramid(GOLDEN_HF, write_recipe(folder.with_suffix(".yaml"), **changes), folder)
    return folder


def pyramid_checkpoint(folder: Path) -> Path:
    """The same, imported."""
    import_hf(pyramid_folder(folder.with_name(f"{folder.name}_hf")), folder)
    return folder
