"""A needle in a document of a million tokens, on two ranks, against float64 arithmetic that needs no attention matrix.

The first layer's attention output is zero in this checkpoint, so the second layer's keys and values follow from each
token alone: the reference goes through the document once, in float64, and attends with the last token only. The engine
knows nothing of this and computes everything. The needle is a token whose embedding is made so that the last token's
first head prefers its key, at its place, to a million others.
"""

import json
import math
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.v2pe.layout import SampleLayout, pack_layout
from megatron_v2pe.v2pe.positions import position_units
from tests.support.hf_folders import random_folder
from tests.support.prompts import load_engine
from tests.support.spawn import run_ranks

GIB = 2**30
STRIDE = 1
TILES_PER_IMAGE = 2
NEEDLE = 5  # a token id that is nowhere else
SHARPNESS = (
    5.0  # standard deviation of the scores: the needle's is 8 of them, the best of a million others about 5
)
LOGIT_TOLERANCE = (
    1e-3  # float32 against float64, sharp attention over a million keys; the needle changes whole units
)


class DrawnTiles:
    """Tiles drawn when they are opened, so that none of them is held."""

    def __init__(self, size):
        self.tile_size, self.opened = size, 0

    def load(self, first, last):
        self.opened += last - first
        return np.stack([self.tile(number) for number in range(first, last)])

    def tile(self, number):
        return np.random.default_rng(number).standard_normal(
            (3, self.tile_size, self.tile_size), dtype=np.float32
        )


def make_folder(folder):
    """Two layers of width 64; the first one's attention adds nothing."""
    llm = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    random_folder(
        folder,
        shards=1,
        dtype=torch.float32,
        llm={**llm, "intermediate_size": 96, "vocab_size": 600},
        vision={"num_hidden_layers": 1},
        top={"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": STRIDE},
        scaled=True,
    )
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["language_model.model.layers.0.attention.wo.weight"].zero_()
    tensors["language_model.model.layers.1.attention.wo.weight"] *= (
        4  # what is attended to decides about the answer
    )
    save_file(tensors, path, metadata={"format": "pt"})


def make_prompt(arch, tokens, *, has_needle=True, seed=0):
    """An image of two tiles in every thousand tokens, the needle in the text at three tenths."""
    per_tile = arch.tokens_per_tile
    images = tokens // 1000
    width = TILES_PER_IMAGE * per_tile
    text = tokens - images * width
    number = np.arange(images)
    starts = number * width + (number + 1) * text // (images + 1)
    ids = np.random.default_rng(seed).integers(10, 600, tokens)
    layout = SampleLayout(
        num_tokens=tokens,
        image_starts=starts,
        num_tiles=np.full(images, TILES_PER_IMAGE),
        strides=np.full(images, STRIDE),
        tokens_per_tile=per_tile,
    )
    if has_needle:
        ids[place_of_needle(layout)] = NEEDLE
    return Prompt(tokens=ids, layout=layout, tiles=DrawnTiles(arch.image_size))


def place_of_needle(layout):
    """The token before an image."""
    return int(layout.image_starts[3 * layout.num_images // 10]) - 1


def plant_needle(folder, prompt):
    """Give the needle's embedding the direction of its key that the last query's first head likes most."""
    reference, layout = Reference(folder), prompt.layout
    per_tile = layout.tokens_per_tile
    places = [layout.num_tokens - 1, place_of_needle(layout)]
    pack = pack_layout([layout])
    units = [torch.from_numpy(position_units(pack, np.array([[place, place + 1]]))) for place in places]
    last = reference["model.tok_embeddings"][prompt.tokens[-1:]]
    last = last + reference.mlp(last, 0)
    query = reference.qkv(last, units[0], per_tile)[0][0, 0, 0]
    y = torch.zeros(1, last.shape[1], dtype=torch.float64, requires_grad=True)
    (query @ reference.rotated(y, units[1], per_tile)[1][0, 0]).backward()
    liked = (
        y.grad[0] * reference["model.layers.1.attention_norm"]
    )  # by the direction before the norm's weight
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    # Queries and keys grow together; a score is their product over sqrt(16).
    growth = SHARPNESS * 4 / float(liked.norm())
    tensors["language_model.model.layers.1.attention.wqkv.weight"] *= growth**0.5
    # So long that what the first layer's MLP adds to it is nothing.
    embedding = 1000 * liked / liked.norm()
    tensors["language_model.model.tok_embeddings.weight"][NEEDLE] = embedding.float()
    save_file(tensors, path, metadata={"format": "pt"})


def answer(rank, world_size, checkpoint, tokens, seed):
    """Token, logits, peak memory and opened tiles of this rank."""
    here = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=0)
    os.environ.update({name: str(value) for name, value in here.items()})
    engine = load_engine(checkpoint, parallel=ParallelConfig(cp=world_size), chunk_tokens=8192)
    prompt = make_prompt(engine.arch, tokens, seed=seed)
    found = engine.begin(prompt, logits=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found.steps[0].token, found.steps[0].logits, peak, prompt.tiles.opened


class Reference:
    """Float64, one pass over the document, attention of its last token in the second layer only."""

    def __init__(self, folder):
        (path,) = folder.glob("*.safetensors")
        self.weights = {name: tensor.double() for name, tensor in load_file(path).items()}
        self.config = json.loads((folder / "config.json").read_text())

    def __getitem__(self, name):
        return self.weights[f"language_model.{name}.weight"]

    def norm(self, x, weight):
        eps = self.config["llm_config"].get("rms_norm_eps", 1e-6)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def mlp(self, x, layer):
        part = f"model.layers.{layer}.feed_forward"
        x = self.norm(x, self[f"model.layers.{layer}.ffn_norm"])
        gate = torch.nn.functional.silu(x @ self[f"{part}.w1"].T)
        return (gate * (x @ self[f"{part}.w3"].T)) @ self[f"{part}.w2"].T

    def qkv(self, x, units, per_tile):
        """Rotated queries [t, 2, 2, 16], keys and values [t, 2, 16] of the second layer."""
        return self.rotated(self.norm(x, self["model.layers.1.attention_norm"]), units, per_tile)

    def rotated(self, x, units, per_tile):
        """See `qkv`; linear in the normalised hidden states."""
        parts = (x @ self["model.layers.1.attention.wqkv"].T).unflatten(-1, (2, 4, 16))
        base = self.config["llm_config"].get("rope_theta", 10000.0)
        angles = (units.double() / per_tile)[:, None] * base ** -(torch.arange(8, dtype=torch.float64) / 8)
        cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
        first, second = parts[:, :, :3].chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned[:, :, :2], turned[:, :, 2], parts[:, :, 3]

    def logits(self, prompt, features):
        """Of the last token."""
        layout, per_tile = prompt.layout, prompt.layout.tokens_per_tile
        keys, values, last = [], [], None
        for start in range(0, layout.num_tokens, 2**16):
            stop = min(layout.num_tokens, start + 2**16)
            x = self["model.tok_embeddings"][torch.from_numpy(prompt.tokens[start:stop])].clone()
            spans = zip(layout.image_starts.tolist(), range(layout.num_images), strict=True)
            for image_start, image in spans:
                low, high = max(start, image_start), min(stop, image_start + TILES_PER_IMAGE * per_tile)
                if low < high:
                    row = image * TILES_PER_IMAGE * per_tile + low - image_start
                    x[low - start : high - start] = features(row, row + high - low)
            x = x + self.mlp(x, 0)
            units = position_units(pack_layout([layout]), np.array([[start, stop]]))
            query, key, value = self.qkv(x, torch.from_numpy(units), per_tile)
            keys.append(key)
            values.append(value)
            last = x[-1], query[-1]
        key, value = torch.cat(keys), torch.cat(values)
        x, query = last
        weights = (torch.einsum("kgd,tkd->kgt", query, key) / math.sqrt(16)).softmax(-1)
        out = torch.einsum("kgt,tkd->kgd", weights, value).flatten()
        x = x + self["model.layers.1.attention.wo"] @ out
        x = x + self.mlp(x[None], 1)[0]
        return self["output"] @ self.norm(x, self["model.norm"])


def tile_features(folder, prompt):
    """Rows of the projector, made tile by tile in float64 by the second implementation."""
    from megatron_v2pe.checkpoint.hf.weights import HFWeights
    from megatron_v2pe.verification.numerics.reference_model import ReferenceModel

    model = ReferenceModel(read_architecture(folder), HFWeights(folder).read, is_v2pe=True)
    per_tile, known = prompt.layout.tokens_per_tile, {}

    def rows(first, last):
        found = []
        for tile in range(first // per_tile, -(-last // per_tile)):
            if tile not in known:
                known.clear()
                *_, hidden = model.vision_states(torch.from_numpy(prompt.tiles.tile(tile))[None])
                known[tile] = model.features(hidden)
            base = tile * per_tile
            found.append(known[tile][max(first - base, 0) : min(last - base, per_tile)])
        return torch.cat(found)

    return rows


def document(tmp_path, tokens):
    """Folder, seed and float64 logits of the first document whose needle changes the answer, not its logits alone."""
    for seed in range(8):
        folder = tmp_path / f"hf_{seed}"
        make_folder(folder)
        arch = read_architecture(folder)
        plant_needle(folder, make_prompt(arch, tokens, seed=seed))
        prompts = (
            make_prompt(arch, tokens, has_needle=has_needle, seed=seed) for has_needle in (True, False)
        )
        wanted, without = (
            Reference(folder).logits(prompt, tile_features(folder, prompt)) for prompt in prompts
        )
        assert float((wanted - without).abs().max()) > 100 * LOGIT_TOLERANCE
        if int(wanted.argmax()) != int(without.argmax()):
            return folder, seed, wanted
    pytest.fail("in none of eight documents does the needle change the answer")


def check(tmp_path, tokens, *, timeout):
    folder, seed, wanted = document(tmp_path, tokens)
    import_hf(folder, tmp_path / "checkpoint")
    found = run_ranks(answer, 2, tmp_path / "checkpoint", tokens, seed, timeout=timeout)
    for token, logits, peak, _ in found:
        error = float((logits.double() - wanted).abs().max())
        assert error < LOGIT_TOLERANCE, error
        assert token == int(wanted.argmax())
        assert peak < 6 * GIB, peak / GIB
    opened = [count for *_, count in found]
    assert sum(opened) == TILES_PER_IMAGE * (tokens // 1000)
    assert max(opened) - min(opened) <= 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(570)
def test_sixty_five_thousand_tokens(tmp_path):
    check(tmp_path, 65_536, timeout=400)


@pytest.mark.million
@pytest.mark.distributed
@pytest.mark.timeout(4 * 3600)
def test_a_million_tokens(tmp_path):
    """2,096 tiles; attention alone is 3e14 FLOPs, about an hour on two cores."""
    check(tmp_path, 1_048_576, timeout=4 * 3600 - 60)
