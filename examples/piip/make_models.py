"""Four small InternVL2 models that differ in their vision tower only: plain ones, and the parts of a pyramid.

    tokenizer and config.json of the quickstart's folder + sizes below + seed
        --> plain, deep, pixels   Hugging Face folders, each a plain tower
        --> branch                a tower of its own: the pyramid's smaller network
        --> pyramid.yaml          what `add-piip` adds to `plain`, read through the large branch
        --> readout_llava.yaml    the same, with every branch read

Language model and projector of one seed start from the same numbers wherever their shapes agree.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from megatron_v2pe.core.files import commit_folder

WIDTH, LAYERS, HEADS, KV_HEADS, FFN = 64, 2, 4, 2, 192
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tower:
    """A vision transformer: pixels of a picture's side and of a patch's, channels, layers, heads."""

    pixels: int
    patch: int
    width: int
    layers: int
    heads: int
    joined: int = 1
    """Patches of a side that the pixel shuffle joins to one visual token."""

    @property
    def patches(self) -> int:
        """Of a picture."""
        return (self.pixels // self.patch) ** 2


TOWERS = {
    "plain": Tower(pixels=8, patch=2, width=64, layers=2, heads=4),
    "deep": Tower(pixels=8, patch=2, width=64, layers=5, heads=4),
    "pixels": Tower(pixels=32, patch=4, width=64, layers=1, heads=4, joined=2),
    "branch": Tower(pixels=32, patch=4, width=32, layers=2, heads=2),
}
INTERACTIONS = 2


def recipe(branch: Path, **more: Any) -> dict[str, Any]:
    """The pyramid around `plain`; the smaller network's weights are those of the folder `branch`."""
    tower = TOWERS["branch"]
    sizes = {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": 4 * tower.width,
        "image_size": tower.pixels,
        "patch_size": tower.patch,
        "weights": str(branch),
    }
    return {"branches": [sizes], "interactions": INTERACTIONS, "deform_num_heads": 4, **more}


class Draw:
    """Random tensors, each from a generator of its own: equal names and shapes get equal numbers in every model."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.tensors: dict[str, Array] = {}

    def normal(self, name: str, shape: tuple[int, ...], deviation: float) -> None:
        """A tensor of normal numbers."""
        generator = np.random.default_rng([self._seed, *name.encode()])
        self.tensors[name] = generator.normal(0.0, deviation, shape).astype(np.float32)

    def filled(self, name: str, size: int, value: float) -> None:
        """A vector of one number."""
        self.tensors[name] = np.full(size, value, dtype=np.float32)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        """Weight of deviation 1/sqrt(inputs), bias zero."""
        self.normal(f"{name}.weight", (outputs, inputs), inputs**-0.5)
        self.filled(f"{name}.bias", outputs, 0.0)

    def norm(self, name: str, size: int) -> None:
        """Weight one, bias zero."""
        self.filled(f"{name}.weight", size, 1.0)
        self.filled(f"{name}.bias", size, 0.0)


def draw_vision(draw: Draw, tower: Tower) -> None:
    """A whole tower, LayerScale one."""
    width, prefix = tower.width, "vision_model.embeddings."
    draw.normal(f"{prefix}class_embedding", (1, 1, width), 0.02)
    draw.normal(f"{prefix}position_embedding", (1, 1 + tower.patches, width), 0.02)
    draw.normal(
        f"{prefix}patch_embedding.weight", (width, 3, tower.patch, tower.patch), (3 * tower.patch**2) ** -0.5
    )
    draw.filled(f"{prefix}patch_embedding.bias", width, 0.0)
    for layer in range(tower.layers):
        prefix = f"vision_model.encoder.layers.{layer}."
        draw.linear(f"{prefix}attn.qkv", width, 3 * width)
        draw.linear(f"{prefix}attn.proj", width, width)
        draw.linear(f"{prefix}mlp.fc1", width, 4 * width)
        draw.linear(f"{prefix}mlp.fc2", 4 * width, width)
        for norm in ("norm1", "norm2"):
            draw.norm(prefix + norm, width)
        for scale in ("ls1", "ls2"):
            draw.filled(prefix + scale, width, 1.0)


def draw_rest(draw: Draw, tower: Tower, vocab_size: int) -> None:
    """Projector and language model: 1/sqrt(inputs), residual outputs smaller, as language models do.

    At the usual deviation of 0.02 a model of 64 channels would hardly pass on what the picture says.
    """
    joined, head_dim = tower.joined**2 * tower.width, WIDTH // HEADS
    draw.norm("mlp1.0", joined)
    draw.linear("mlp1.1", joined, WIDTH)
    draw.linear("mlp1.3", WIDTH, WIDTH)
    draw.normal("language_model.model.tok_embeddings.weight", (vocab_size, WIDTH), 0.5)
    draw.normal("language_model.output.weight", (vocab_size, WIDTH), 0.02)
    draw.filled("language_model.model.norm.weight", WIDTH, 1.0)
    inner, residual = WIDTH**-0.5, 1 / math.sqrt(2 * LAYERS)
    for layer in range(LAYERS):
        prefix = f"language_model.model.layers.{layer}."
        draw.normal(f"{prefix}attention.wqkv.weight", ((HEADS + 2 * KV_HEADS) * head_dim, WIDTH), inner)
        draw.normal(f"{prefix}attention.wo.weight", (WIDTH, WIDTH), residual * inner)
        draw.normal(f"{prefix}feed_forward.w1.weight", (FFN, WIDTH), inner)
        draw.normal(f"{prefix}feed_forward.w3.weight", (FFN, WIDTH), inner)
        draw.normal(f"{prefix}feed_forward.w2.weight", (WIDTH, FFN), residual * FFN**-0.5)
        for norm in ("attention_norm", "ffn_norm"):
            draw.filled(f"{prefix}{norm}.weight", WIDTH, 1.0)


def model_config(quick: dict[str, Any], tower: Tower) -> dict[str, Any]:
    """The quickstart's config.json with other sizes."""
    config = copy.deepcopy(quick)
    config |= {"force_image_size": tower.pixels, "downsample_ratio": 1 / tower.joined}
    config["vision_config"] |= {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": 4 * tower.width,
        "image_size": tower.pixels,
        "patch_size": tower.patch,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
    }
    config["llm_config"] |= {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
    }
    return config


def write_models(folder: Path, quickstart: Path, *, seed: int) -> None:
    """All folders and the recipe; each folder is written aside and then given its name."""
    quick = json.loads((quickstart / "config.json").read_text())
    for name, tower in TOWERS.items():
        draw = Draw(seed)
        draw_vision(draw, tower)
        draw_rest(draw, tower, quick["llm_config"]["vocab_size"])
        aside = folder / f".{name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(quickstart, aside, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
        (aside / "config.json").write_text(json.dumps(model_config(quick, tower), indent=2) + "\n")
        save_file(draw.tensors, aside / "model.safetensors", metadata={"format": "pt"})
        commit_folder(aside, folder / name)
    side = TOWERS["plain"].pixels // TOWERS["plain"].patch  # as many tokens as `plain` has
    llava = recipe(folder / "branch", readout="llava", readout_grid=side)
    (folder / "readout_llava.yaml").write_text(yaml.safe_dump(llava, sort_keys=False))
    # Written last: its presence says that all is there.
    # Towers start at random, so there is nothing that gates of zero would keep, and through them alone `large` reads.
    large = recipe(folder / "branch", gate_init=0.5)
    (folder / "pyramid.yaml").write_text(yaml.safe_dump(large, sort_keys=False))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to fill")
    parser.add_argument(
        "--quickstart", type=Path, required=True, help="folder of the quickstart's checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_models(arguments.folder, arguments.quickstart, seed=arguments.seed)


if __name__ == "__main__":
    main()
