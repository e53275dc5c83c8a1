"""Shards of all ranks make up the model: real sizes without weights, and faults that must be found."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_v2pe.assembly.rank_model import rank_model
from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.checkpoint.layout_check import Tiling, rank_shards
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig
from megatron_v2pe.parallel.plan import resolve

ROOT = Path(__file__).parents[3]
TINY = json.loads((ROOT / "tests" / "golden" / "ckpt" / "b_internlm2_vit6b" / "config.json").read_text())
SPLIT = dict(sequence_parallel=True, vision="tensor")


def shards_of_all_ranks(arch, *, dp=1, **layout):
    config = RunConfig(parallel=ParallelConfig(**layout))
    replica = config.parallel.tp * config.parallel.pp * config.parallel.cp
    plan = resolve(config.parallel, replica * dp)
    found = []
    for rank in range(plan.world_size):
        with rank_model(config, arch, plan=plan, rank=rank) as (model_chunks, ranks):
            found.append(rank_shards(model_chunks, ranks))
    return found


def problems(arch, ranks):
    tiling = Tiling()
    for shards in ranks:
        tiling.add(shards)
    return tiling.problems(name_map(arch))


def tiny(**llm):
    return parse_architecture({**TINY, "llm_config": {**TINY["llm_config"], **llm}})


@pytest.mark.parametrize(
    ("layout", "llm"),
    [
        (dict(), {}),
        (dict(tp=2, pp=2, cp=2), {}),
        (dict(tp=2, dp=2, **SPLIT), {}),
        (dict(pp=2, vpp=2), {"num_hidden_layers": 4}),
        (dict(pp=2, tp=2), {"tie_word_embeddings": True}),
        (dict(pp=3, pipeline_layout="E|tt|L"), {}),
    ],
)
def test_every_element_is_written_once(layout, llm):
    arch = tiny(**llm)
    assert problems(arch, shards_of_all_ranks(arch, **layout)) == []


@pytest.mark.parametrize(
    ("size", "layout"),
    [("26B", dict(tp=8, **SPLIT)), ("40B", dict(tp=4, pp=2)), ("1B", dict(tp=2, pp=4, vpp=3))],
)
def test_true_sizes(size, layout):
    arch = parse_architecture(PUBLISHED[size])
    assert problems(arch, shards_of_all_ranks(arch, **layout)) == []


@pytest.fixture(scope="module")
def ranks():
    return shards_of_all_ranks(tiny(), tp=2, pp=2)


def faulty(ranks, change):
    """Problems after `change(shards)` on a copy of the last rank's shards."""
    changed = [list(shards) for shards in ranks]
    change(changed[-1])
    return problems(tiny(), changed)


def index(shards, part):
    return next(i for i, shard in enumerate(shards) if part in shard.key and shard.is_written)


def test_a_lost_shard(ranks):
    found = faulty(ranks, lambda shards: shards.pop(index(shards, "linear_fc2")))
    name = "language.decoder.layers.1.mlp.linear_fc2.weight"
    assert found == [f"{name}: 6912 elements are written, the tensor has 13824"]


def test_a_shard_written_twice(ranks):
    found = faulty(ranks, lambda shards: shards.append(shards[index(shards, "linear_proj")]))
    assert any("linear_proj.weight" in problem and "overlap" in problem for problem in found)


def test_a_layer_with_the_wrong_number(ranks):
    def rename(shards):
        shards[:] = [
            dataclasses.replace(shard, key=shard.key.replace("layers.1", "layers.7")) for shard in shards
        ]

    found = faulty(ranks, rename)
    assert "language.decoder.layers.7.mlp.linear_fc1.weight: not in the table of names" in found


def test_a_wrong_shape(ranks):
    def shrink(shards):
        at = index(shards, "linear_qkv")
        shards[at] = dataclasses.replace(shards[at], whole_shape=(2, 2))

    assert any("disagree" in problem for problem in faulty(ranks, shrink))


def test_copies_that_no_rank_writes(ranks):
    def copy(shards):
        at = index(shards, "linear_qkv")
        shards[at] = dataclasses.replace(shards[at], is_written=False)

    assert any("has copies, but no rank writes it" in problem for problem in faulty(ranks, copy))


def tool(*arguments, timeout=280):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "check_layout.py", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_tool_on_a_folder():
    done = tool(
        "--arch-from", str(ROOT / "tests/golden/ckpt/d_llama_vit6b/config.json"), "--tp", "2", "--cp", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "llama_vit6b: " in done.stdout
    assert "every element is written once" in done.stdout


def test_the_tool_refuses_a_layout_that_does_not_fit():
    done = tool("--size", "1B", "--tp", "4")
    assert done.returncode == 2
    assert "parallel.tp is 4, but must divide the 14 attention heads" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout", "found"),
    [
        ("3.5-38B", dict(tp=8, pp=4), ("32 ranks built",)),
        # 94 layers: fewer on the stages of embedding and tower, and of the head.
        (
            "3.5-241B-A28B",
            dict(tp=8, pp=8, ep=8, layout="Et*11|" + "t*12|" * 6 + "t*11L"),
            ("64 ranks built",),
        ),
    ],
)
def test_the_largest_of_later_series(size, layout, found):
    arguments = [argument for name, value in layout.items() for argument in (f"--{name}", str(value))]
    done = tool("--size", size, "--sp", *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    num_parameters = name_map(parse_architecture(PUBLISHED[size])).num_parameters
    assert f"{num_parameters:,} numbers" in done.stdout
    assert all(text in done.stdout for text in (*found, "every element is written once"))


def test_76b_at_tp8_pp4():
    done = tool("--size", "76B", "--tp", "8", "--pp", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "76,262,358,400 numbers" in done.stdout
    assert "32 ranks built" in done.stdout
    assert done.stderr == ""
