"""Greedy answers of Qwen2, Llama and Phi-3, for which the release has no recorded ones.

Judge is the plain PyTorch model: float64, no cache, the whole sequence anew for every token.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.pipeline import split_layers
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.tiles import ArrayTiles
from megatron_v2pe.v2pe.layout import SampleLayout
from megatron_v2pe.verification.numerics.reference_model import ReferenceModel, positions_of
from tests.support.spawn import run_ranks

CKPT = Path(__file__).parents[1] / "golden" / "ckpt"
KEYS = ("c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
LAYOUTS = {"tp2": dict(tp=2), "pp2": dict(pp=2), "cp2": dict(cp=2)}
STRIDES = (0, 1)  # ordinary positions, a visual token at 1/T
NUM_NEW = 6
MARGIN = 1e-3  # between first and second choice; logits are right to 1e-4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    for key in KEYS:
        import_hf(CKPT / key, root / key)
    return {key: root / key for key in KEYS}


def make_prompt(arch, stride):
    """9 words, an image of 2 tiles, 5 words."""
    generator = np.random.default_rng(7)
    visual = 2 * arch.tokens_per_tile
    tokens = generator.integers(1, arch.language.vocab_size, size=9 + visual + 5)
    tokens[9 : 9 + visual] = 0
    layout = SampleLayout(
        num_tokens=len(tokens),
        image_starts=np.array([9]),
        num_tiles=np.array([2]),
        strides=np.array([stride or arch.tokens_per_tile]),
        tokens_per_tile=arch.tokens_per_tile,
    )
    tiles = generator.standard_normal((2, 3, arch.image_size, arch.image_size), dtype=np.float32)
    return Prompt(tokens=tokens, layout=layout, tiles=ArrayTiles(tiles, [2]))


def reference_answer(key, stride):
    arch = read_architecture(CKPT / key)
    prompt = make_prompt(arch, stride)
    model = ReferenceModel(arch, HFWeights(CKPT / key).read, is_v2pe=stride > 0)
    *_, hidden = model.vision_states(torch.from_numpy(prompt.tiles.load(0, 2)))
    features = model.features(hidden)
    slots = torch.arange(9, 9 + len(features))
    step = (stride or arch.tokens_per_tile) / arch.tokens_per_tile
    tokens = prompt.tokens.tolist()
    visual = [index in range(9, 9 + len(features)) for index in range(len(tokens))]
    answer = []
    for _ in range(NUM_NEW):
        positions = torch.tensor(positions_of(visual, [step]), dtype=torch.float64)
        x = model.embed(torch.tensor(tokens), features, slots)
        *_, states = model.decoder_states(x, positions, [0, len(tokens)])
        best = model.logits(states[-1:])[0].topk(2)
        assert float(best.values[0] - best.values[1]) > MARGIN
        answer.append(int(best.indices[0]))
        tokens.append(answer[-1])
        visual.append(False)
    return answer


def answers(rank, world_size, checkpoints, layouts):
    here = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=0)
    os.environ.update({name: str(value) for name, value in here.items()})  # the engine asks the launcher
    found = {}
    for name, layout in layouts.items():
        for key, checkpoint in checkpoints.items():
            arch = read_architecture(CKPT / key)
            stages = split_layers(arch.language.num_layers, num_stages=layout.get("pp", 1))
            for stride in STRIDES:
                engine = Engine.load(
                    checkpoint,
                    mode="v2pe_fixed" if stride else "default",
                    parallel=ParallelConfig(**layout, pipeline_layout=stages),
                )
                prompt = make_prompt(arch, stride)
                found[name, key, stride] = engine.generate(prompt, max_new_tokens=NUM_NEW)
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.distributed
def test_one_rank_and_two(checkpoints):
    (one,) = run_ranks(answers, 1, checkpoints, {"one": {}}, timeout=120)
    wanted = {(key, stride): reference_answer(key, stride) for key in KEYS for stride in STRIDES}
    assert {which[1:]: answer for which, answer in one.items()} == wanted
    assert len({tuple(answer) for answer in wanted.values()}) == len(wanted)  # no trivial answers
    two = run_ranks(answers, 2, checkpoints, LAYOUTS, timeout=180)
    assert two[0] == two[1]
    for (name, *which), answer in two[0].items():
        assert answer == wanted[tuple(which)], (name, *which)
