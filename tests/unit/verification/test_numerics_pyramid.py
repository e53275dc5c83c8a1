"""`verify-numerics` of a pyramid with open gates: our tower against the formulas with gathered corners, in float64."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.verification.numerics.compare import compare_numerics
from tests.support import tiny
from tests.support.piip import pyramid_checkpoint
from tests.support.spawn import run_ranks


def compare(source, checkpoint, **layout):
    parallel = ParallelConfig(**layout)
    rows = compare_numerics(
        source, checkpoint, parallel=parallel, world_size=parallel.tp * parallel.cp, every=1
    )
    shutdown()
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return pyramid_checkpoint(tmp_path_factory.mktemp("numerics") / "pyramid", gates=True)


def hf_of(checkpoint):
    return checkpoint.with_name(f"{checkpoint.name}_hf")


LLAVA = {"readout": "llava", "readout_grid": 5}
INTERACTIONS = [f"vision.interaction.1{end}" for end in ("", ".branch.1", ".branch.2")] + [
    "vision.interaction.2"
]


def test_every_stage_of_the_tower_agrees(checkpoint):
    rows = compare(hf_of(checkpoint), checkpoint)
    assert [name for name in rows if "interaction" in name] == INTERACTIONS
    assert all(row.passes for row in rows.values()), rows
    assert rows["vision.layer.2"].error > 0, "float32 against float64"


@pytest.mark.parametrize(
    "changes",
    [
        {"interact_attn_type": "dense", "interactions": 1},
        {"norm_layer": "none", "interaction_proj": False, "deform_ratio": 1.0},
        LLAVA,
        {"readout": "llava", "readout_norm": "ln"},
    ],
    ids=["dense", "no norm, no projection", "readout llava", "readout llava, LayerNorm, finest grid"],
)
def test_other_kinds_of_interaction(tmp_path, changes):
    checkpoint = pyramid_checkpoint(tmp_path / "other", gates=True, **changes)
    assert all(row.passes for row in compare(hf_of(checkpoint), checkpoint).values())


@pytest.mark.parametrize(
    ("part", "first"),
    [
        (
            "interactions.0.interaction_units_12.branch2to1_injector.attn.sampling_offsets.bias",
            INTERACTIONS[0],
        ),
        ("interactions.0.interaction_units_23.branch1to2_injector.cffn_gamma", INTERACTIONS[2]),
        ("branches.1.encoder.layers.0.mlp.fc1.bias", INTERACTIONS[0]),
    ],
)
def test_one_other_tensor_is_seen_where_it_first_matters(checkpoint, tmp_path, part, first):
    """The other folder differs in one tensor: stages before it agree, the first one that it reaches does not."""
    shutil.copytree(hf_of(checkpoint), tmp_path / "hf")
    path = tmp_path / "hf" / PYRAMID_FILE
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = tensors[name] + 0.3
    save_file(tensors, path, metadata={"format": "pt"})
    rows = compare(tmp_path / "hf", checkpoint)
    assert rows["vision.layer.1"].passes
    assert not rows[first].passes
    assert not rows["logits"].passes


def test_the_readout_of_all_branches_is_compared(tmp_path):
    """Smaller branches after the last interaction are stages too; one other bias is seen at the projector first."""
    checkpoint = pyramid_checkpoint(tmp_path / "llava", gates=True, **LLAVA)
    path = hf_of(checkpoint) / PYRAMID_FILE
    tensors = load_file(path)
    tensors["mm_projector.branch2.6.bias"] = tensors["mm_projector.branch2.6.bias"] + 0.3
    save_file(tensors, path, metadata={"format": "pt"})
    rows = compare(hf_of(checkpoint), checkpoint)
    assert [f"vision.interaction.2.branch.{branch}" in rows for branch in (1, 2)] == [True, True]
    assert rows["vision"].passes
    assert not rows["projector"].passes
    assert not rows["logits"].passes


def test_a_plain_source_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="branches of a pyramid is 0 in the source and 2 in the checkpoint"):
        compare(tiny.GOLDEN_HF, checkpoint)


def on_two_ranks(rank, world_size, source, checkpoint, layout):
    return [row.passes for row in compare(source, checkpoint, **layout).values()]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tp": 2, "vision": "tensor"}, {"cp": 2}], ids=["tp2", "cp2"])
@pytest.mark.parametrize("readout", [{}, LLAVA], ids=["large", "llava"])
def test_two_ranks(tmp_path, readout, layout):
    checkpoint = pyramid_checkpoint(tmp_path / "pyramid", gates=True, **readout)
    for passes in run_ranks(on_two_ranks, 2, hf_of(checkpoint), checkpoint, layout, timeout=200):
        assert passes
        assert all(passes)
