"""A small mixture on disk, and the settings to read it with the golden InternLM2 tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, OptimConfig, PositionConfig, RunConfig, RuntimeConfig
from megatron_v2pe.data.loader import TrainLoader
from megatron_v2pe.data.samples.measure import LineMeasurer
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.sources.meta import DatasetEntry

HF_FOLDER = Path(__file__).parents[1] / "golden" / "ckpt" / "a_internlm2_vit300m"
IMAGE_SIZE = 112  # of that checkpoint; 16 visual tokens per tile


def write_image(path, width, height, *, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def measure(line, number, *, entry, settings):
    """Lengths of the one sample that a line makes."""
    (sample,) = LineMeasurer(entry, settings)(line, number)
    return sample.measurement


def record(question, answer, image=None):
    values = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    return values if image is None else {**values, "image": image}


def entry(**changes):
    return DatasetEntry(**{"name": "set", "annotation": "a.jsonl", **changes})


@dataclass
class Mixture:
    """A folder with annotations, images and a meta json; `config` reads it."""

    folder: Path

    def write(self, records, *, name="a", **meta):
        """Write one annotation file and (re)write the meta json with it."""
        lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        path = self.folder / "meta.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[name] = {
            "annotation": f"{name}.jsonl",
            "root": "images",
            "repeat_time": 1,
            "data_augment": False,
            **meta,
        }
        path.write_text(json.dumps(known))

    def config(self, *, steps=4, batch=2, seed=42, position=None, **data):
        values = {
            "max_pack_tokens": 1024,
            "max_sample_tokens": 1024,
            "max_pack_tiles": 40,
            "max_dynamic_patch": 4,
            "cache_dir": str(self.folder / "cache"),
            **data,
        }
        return RunConfig(
            data=DataConfig(meta=str(self.folder / "meta.json"), **values),
            position=position or PositionConfig(),
            optim=OptimConfig(steps=steps, global_batch_size=batch),
            runtime=RuntimeConfig(seed=seed),
        )

    def loader(self, config, *, dp=(0, 1), tile=(0, 1), holds_vision=True, start_step=0, pad=4):
        return TrainLoader(
            config,
            read_architecture(HF_FOLDER),
            HF_FOLDER,
            dp_rank=dp[0],
            dp=dp[1],
            tile_rank=tile[0],
            tile_ranks=tile[1],
            holds_vision=holds_vision,
            pad_to_multiple=pad,
            start_step=start_step,
        )

    def settings(self, **data):
        return sample_settings(self.config(**data), read_architecture(HF_FOLDER), HF_FOLDER)


def filled_mixture(folder):
    """24 samples with 0 to 3 images each, in two data sets."""
    mixture = empty_mixture(folder)
    generator = np.random.default_rng(3)
    records = []
    for number in range(24):
        names = [f"{number}_{place}.png" for place in range(number % 4)]
        for place, name in enumerate(names):
            width, height = generator.integers(40, 300, 2).tolist()
            write_image(mixture.folder / "images" / name, width, height, seed=number * 7 + place)
        question = "<image>\n" * len(names) + "what is it? " * int(generator.integers(1, 12))
        records.append(record(question, "a thing " * int(generator.integers(1, 6)), names or None))
    mixture.write(records[:16], name="a", repeat_time=1.5)
    mixture.write(records[16:], name="b", data_augment=True, max_dynamic_patch=2)
    return mixture


def empty_mixture(folder):
    """A mixture without annotations yet."""
    (folder / "images").mkdir()
    return Mixture(folder)
