"""Prefill in chunks gives the numbers of one pass: any chunk, layout, stride, with cuts inside images.

Float64 first: 1e-10 leaves room for sums in another order and nothing else. In float32 the same comparison may
differ by rounding, 1e-4 as for the golden logits.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.pipeline import split_layers
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.tiles import ArrayTiles
from megatron_v2pe.v2pe.layout import SampleLayout
from tests.support.spawn import run_ranks

CKPT = Path(__file__).parents[1] / "golden" / "ckpt"
FAMILIES = ("a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
LATER = ("h_qwen3_vit300m", "j_qwen3moe_vit300m", "l_gptoss_vit300m", "n_internlm2_vit300m")
CHUNKS = (64, 100, 257, 10**6)
NUM_NEW = 3
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
TWO = {
    "tp2": dict(tp=2),
    "tp2 sp": dict(tp=2, sequence_parallel=True, vision="tensor"),  # as trained; the engine splits neither
    "pp2": dict(pp=2),
    "cp2": dict(cp=2),
}
FOUR = {
    "cp4": dict(cp=4),
    "tp2 cp2": dict(tp=2, cp=2),
    "tp2 pp2": dict(tp=2, pp=2),
    "pp2 cp2": dict(pp=2, cp=2),
}


def golden(key):
    """The Hugging Face folder of a family."""
    folder = CKPT / key
    return folder if folder.exists() else CKPT.parents[1] / "golden_families" / "ckpt" / key


def make_prompt(arch, stride, *, is_first):
    """About 300 tokens: an image at the very start and one in the middle, or the middle one and one at the very end."""
    generator = np.random.default_rng(11 + is_first)
    per_tile = arch.tokens_per_tile
    tiles = [64 // per_tile + 1, 96 // per_tile + 2]
    lengths = [count * per_tile for count in tiles]
    text = 290 - sum(lengths)
    starts = [0, lengths[0] + 21] if is_first else [text - 4, text - 4 + lengths[0] + 4]
    total = text + sum(lengths)
    tokens = generator.integers(1, arch.language.vocab_size, size=total)
    for start, length in zip(starts, lengths, strict=True):
        tokens[start : start + length] = 0
    layout = SampleLayout(
        num_tokens=total,
        image_starts=np.array(starts),
        num_tiles=np.array(tiles),
        strides=np.full(2, stride),
        tokens_per_tile=per_tile,
    )
    pixels = generator.standard_normal((sum(tiles), 3, arch.image_size, arch.image_size), dtype=np.float32)
    return Prompt(tokens=tokens, layout=layout, tiles=ArrayTiles(pixels, tiles))


def rows(engine, prompt):
    """Tokens and logits of a few steps."""
    steps = list(engine.stream(prompt, max_new_tokens=NUM_NEW, logits=True))
    return [step.token for step in steps], torch.stack([step.logits for step in steps])


def answers(rank, world_size, checkpoints, layouts, strides, chunks, dtype):
    here = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=0)
    os.environ.update({name: str(value) for name, value in here.items()})
    found, opened = {}, {}
    for name, layout in layouts.items():
        for key, checkpoint in checkpoints.items():
            arch = read_architecture(golden(key))
            stages = split_layers(arch.language.num_layers, num_stages=layout.get("pp", 1))
            engine = Engine.load(
                checkpoint,
                mode="v2pe_fixed",
                dtype=dtype,
                parallel=ParallelConfig(**layout, pipeline_layout=stages),
            )
            for share in strides:
                for is_first in (True, False):
                    for chunk in chunks:
                        stride = max(1, round(share * arch.tokens_per_tile))
                        prompt = make_prompt(arch, stride, is_first=is_first)
                        engine.chunk_tokens = chunk
                        which = (key, share, is_first)
                        found[(name, *which, chunk)] = rows(engine, prompt)
                        opened[(name, *which, chunk)] = prompt.tiles.opened
        parallel_state.destroy_model_parallel()
    return found, opened


def check(found, wanted, tolerance):
    """Every answer against the one of one rank and one pass."""
    for (_, *which, chunk), (tokens, logits) in found.items():
        wanted_tokens, wanted_logits = wanted[("one", *which, CHUNKS[-1])]
        error = float((logits - wanted_logits).abs().max())
        assert error <= tolerance, (which, chunk, error)
        assert tokens == wanted_tokens, (which, chunk)


def compare(tmp_path, families, layouts, *, strides, dtype="float64", chunks=CHUNKS, timeout=240):
    for key in families:
        import_hf(golden(key), tmp_path / key)
    checkpoints = {key: tmp_path / key for key in families}
    ((wanted, opened),) = run_ranks(
        answers, 1, checkpoints, {"one": {}}, strides, chunks, dtype, timeout=timeout
    )
    check(wanted, wanted, TOLERANCE[dtype])
    totals = {which[:-1]: opened[which] for which in opened if which[-1] == CHUNKS[-1]}
    assert all(opened[which] == totals[which[:-1]] for which in opened)  # a cut tile is opened once
    for size, some in layouts.items():
        found = run_ranks(answers, size, checkpoints, some, strides, chunks, dtype, timeout=timeout)
        for result, _ in found:
            check(result, wanted, TOLERANCE[dtype])
        for which in found[0][1]:  # every tile by one rank, whatever the layout, in equal shares
            counts = [count[which] for _, count in found]
            assert sum(counts) == totals[("one", *which[1:-1])]
            encoders = sorted(counts)[-size // some[which[0]].get("pp", 1) :]
            assert max(encoders) - min(encoders) <= 1, (which, counts)
    return wanted


@pytest.mark.distributed
def test_chunks_equal_one_pass_in_float64(tmp_path):
    wanted = compare(tmp_path, FAMILIES[:1], {2: TWO}, strides=(1 / 16,), chunks=(64, 100, CHUNKS[-1]))
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) > 1  # no trivial answers


@pytest.mark.slow
@pytest.mark.timeout(
    1200
)  # 168 prompts for each family, over seven layouts; minutes on two cores that others use too
@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES + LATER)
def test_all_families_chunks_strides_and_layouts(tmp_path, family):
    compare(tmp_path, [family], {2: TWO, 4: FOUR}, strides=(0.0, 0.25, 1.0), timeout=1100)


@pytest.mark.slow
@pytest.mark.distributed
def test_float32_within_rounding(tmp_path):
    compare(tmp_path, FAMILIES[:1], {2: TWO}, strides=(0.0, 1.0), dtype="float32", timeout=560)
