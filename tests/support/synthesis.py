"""Small folders of texts and images to synthesize from, and what reads the result."""

import json
from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.synthesis.settings import SynthesisConfig
from tests.support.tokenizers import FOLDERS

WORDS = (
    "the of tree river stone walks under green and old with seven quietly light a over".split()  # noqa: SIM905
)


def write_texts(folder, *, num_files=12, sentences=60, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(num_files):
        lines = [
            " ".join(random.choice(WORDS, random.integers(6, 18))).capitalize() for _ in range(sentences)
        ]
        text = ". ".join(lines).replace(". T", ".\n\nT") + "."
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def write_images(folder, *, count=24, seed=1):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        width, height = [(112, 112), (224, 112), (112, 224)][number % 3]
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.{'jpg' if number % 2 else 'png'}")
    return folder


def config_for(inputs, out, kinds=("text-retrieval",), **changes):
    defaults = {
        "kinds": kinds,
        "lengths": (1200,),
        "count": 2,
        "num_depths": 5,
        "split": "train",
        "held_out": 0.3,
        "text_per_image": 120,
        "num_decoys": 3,
        "seed": 0,
        "texts": str(inputs / "texts"),
        "images": str(inputs / "images"),
        "vqa": str(inputs / "vqa.jsonl") if any(kind.startswith("longvqa") for kind in kinds) else "",
        "vqa_images": str(inputs / "images"),
        "out": str(out),
        "workers": 1,
    }
    return SynthesisConfig(**{**defaults, **changes})


def settings_of(family="internlm2"):
    folder = FOLDERS[family]
    settings = sample_settings(RunConfig(data=DataConfig()), read_architecture(folder), folder)
    return replace(settings, text=replace(settings.text, max_tokens=2**40))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder):
    """Every file of a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
