"""The golden checkpoint with a small pyramid around its vision tower."""

from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE, add_pyramid
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


def pyramid_checkpoint(folder: Path, *, gates: bool = False, **changes: object) -> Path:
    """The same, imported; with `gates` as after training."""
    source = pyramid_folder(folder.with_name(f"{folder.name}_hf"), **changes)
    import_hf(open_gates(source) if gates else source, folder)
    return folder


def open_gates(folder: Path, *, seed: int = 3) -> Path:
    """Random gates, offsets and attention weights in a folder whose gates are zero, as after training."""
    path = folder / PYRAMID_FILE
    tensors, generator = load_file(path), torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith("_gamma") or "sampling_offsets" in name or "attention_weights" in name:
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
