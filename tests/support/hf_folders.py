"""Small Hugging Face InternVL2 folders for conversion tests."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.config.arch.architecture import parse_architecture

FAMILIES_GOLDEN = Path(__file__).parent.parent / "golden_families"
"""A part of the golden data of InternVL2.5, 3 and 3.5, in the same format; `ckpt_hf` holds native folders."""
GOLDEN = Path(__file__).parent.parent / "golden" / "ckpt" / "a_internlm2_vit300m"


TOKENIZER_IDS = 600
"""Of the golden folder, added tokens included."""


def golden_copy(folder: Path, *, key: str = GOLDEN.name) -> Path:
    """A writable copy of a golden folder, InternLM2 + InternViT-300M if not said otherwise."""
    shutil.copytree(GOLDEN.parent / key, folder, copy_function=shutil.copyfile)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; a dict changes keys of a section."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    path.write_text(json.dumps(values, indent=2) + "\n")


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of model.safetensors (dots in names written `__`); None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def random_folder(
    folder: Path,
    *,
    shards: int,
    dtype: torch.dtype,
    llm: dict,
    vision: dict,
    top: dict | None = None,
    scaled: bool = False,
) -> Path:
    """A folder of other sizes than the golden one, random bits, `shards` weight files.

    The vocabulary has at least the rows of the golden folder's tokenizer, which comes along.
    `scaled` divides matrices by the root of their columns, so that activations stay near 1.
    """
    folder.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, folder / name)
    llm = {**llm, "vocab_size": max(TOKENIZER_IDS, llm.get("vocab_size", 0))}
    edit_config(folder, llm_config=llm, vision_config=vision, **(top or {}))
    arch = parse_architecture(json.loads((folder / "config.json").read_text()))
    generator = torch.Generator().manual_seed(1)
    name_to_shape = name_map(arch).hf_shape
    names = sorted(name_map(arch).by_hf)
    shapes = {name: name_to_shape(name) for name in names}
    scales = {
        name: shape[-1] ** -0.5 if scaled and len(shape) == 2 else 1.0 for name, shape in shapes.items()
    }
    tensors = {
        name: (scales[name] * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }
    per_file = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i * per_file : (i + 1) * per_file]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
