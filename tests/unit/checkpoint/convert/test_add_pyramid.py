"""Adding a pyramid: the folder round-trips, branch weights are taken over by a table, mistakes are named first."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE, add_pyramid
from megatron_v2pe.checkpoint.convert.branch_weights import branch_tensors
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.arch.flops import interaction_flops, tower_flops
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.models.piip.geometry import resize_patch_kernel, resize_positions
from tests.support.hf_folders import folder_bytes
from tests.support.piip import pyramid_folder, write_recipe
from tests.support.tiny import GOLDEN_HF

BRANCH = VisionArchitecture(
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    ffn_size=12,
    image_size=80,
    patch_size=16,
    norm_type="layer_norm",
    norm_eps=1e-6,
    qkv_bias=True,
    qk_normalization=False,
)


def test_import_and_export_give_the_folder_back_byte_for_byte(tmp_path):
    folder = pyramid_folder(tmp_path / "hf")
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(folder)
    assert (folder / "model.safetensors").read_bytes() == (GOLDEN_HF / "model.safetensors").read_bytes()
    new = load_file(folder / PYRAMID_FILE)
    assert all(not tensor.any() for name, tensor in new.items() if name.endswith("_gamma"))
    assert not any("interactions.1" in name and "branch1to2" in name for name in new)


def test_gates_start_where_the_recipe_says(tmp_path):
    """No part of the architecture: config.json does not have it."""
    folder = pyramid_folder(tmp_path / "hf", gate_init=0.25)
    gates = [x for name, x in load_file(folder / PYRAMID_FILE).items() if name.endswith("_gamma")]
    assert gates
    assert all(bool((gate == 0.25).all()) for gate in gates)
    assert "gate_init" not in (folder / "config.json").read_text()


def test_other_formats_refuse_a_pyramid(tmp_path):
    import_hf(pyramid_folder(tmp_path / "hf"), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="only this package's own folders hold"):
        export_hf(tmp_path / "checkpoint", tmp_path / "native", to="hf-native")
    with pytest.raises(CheckpointError, match="it would answer without it"):
        export_hf(tmp_path / "checkpoint", tmp_path / "code", remote_code=True)
    with pytest.raises(CheckpointError, match="has a pyramid already"):
        add_pyramid(tmp_path / "hf", tmp_path / "hf.yaml", tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "hf", "hf.yaml"]


MISTAKES = [
    (
        {"branch0": {"image_size": 200}},
        r"image_size is 200, which its patch_size 16 does not divide; use 192 or 208",
    ),
    ({"branch1": {"image_size": 192}}, r"must exceed the 192 of the branch before it"),
    ({"branch0": {"hidden_size": 96}}, r"hidden_size is 96, more than the 64 of the branch before it"),
    ({"branch0": {"num_attention_heads": 5}}, r"num_attention_heads is 5, which does not divide"),
    ({"interactions": 3}, r"interactions is 3, but must lie in 1..2, the layers of vision_config"),
    ({"deform_num_heads": 16}, r"deform_num_heads is 16, which does not divide the 8 attention channels"),
    ({"cffn_ratio": 0.01}, r"cffn_ratio is 0.01, which leaves no channel"),
    ({"interaction_drop_path_rate": 1.0}, r"interaction_drop_path_rate is 1.0"),
    ({"deform_ratio": "half"}, r"deform_ratio is 'half', but must be a number of at least 0"),
    ({"gate_init": "small"}, r"gate_init is 'small', but must be a number in -1..1"),
    ({"interaction": 2}, r"unknown key 'interaction'; did you mean interactions"),
    ({"branch0": {"hidden": 3}}, r"branches\[0\]: unknown key 'hidden'"),
    ({"branch0": {"num_hidden_layers": 0}}, r"num_hidden_layers is 0, but must be a whole number"),
    (
        {"readout": "sum"},
        r"readout is 'sum', of which there is neither a released model nor recorded numbers",
    ),
    ({"readout": "mean"}, r"readout is 'mean', known values are 'large', 'llava'"),
    ({"readout_grid": 5}, r"readout_grid is given, but readout is 'large'"),
    ({"readout_norm": "gn"}, r"readout_norm is given, but readout is 'large'"),
    ({"readout": "llava", "readout_grid": 15}, r"readout_grid is 15, but must not exceed the 14 cells"),
    ({"readout": "llava", "readout_grid": 0}, r"readout_grid is 0, but must be a whole number of at least 1"),
    ({"readout": "llava", "readout_norm": "rms"}, r"readout_norm is 'rms', known values are 'gn', 'ln'"),
    (
        {"branch1": {"hidden_size": 64, "num_attention_heads": 4}},
        r"hidden_size is 64, more than the 32 of the branch",
    ),
    ({"branch0": {"weights": ""}}, r"branches\[0\].weights is ''"),
    ({"branch1": {"weights": "/nowhere/at/all"}}, r"/nowhere/at/all: cannot be used as a branch"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(row[0]) for row in MISTAKES])
def test_mistakes_are_named_before_anything_is_written(tmp_path, changes, message):
    recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        add_pyramid(GOLDEN_HF, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_verb_ends_with_2_for_a_mistake(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", interactions=9)
    assert main(["add-piip", str(GOLDEN_HF), str(recipe), str(tmp_path / "out")]) == 2
    assert "interactions is 9" in capsys.readouterr().err


def timm_model(*, has_class_row, scale):
    """A DeiT-like state dict of patch 14 and a 4 x 4 grid."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {
        "cls_token": draw(1, 1, 8),
        "pos_embed": draw(1, 16 + has_class_row, 8),
        "patch_embed.proj.weight": draw(8, 3, 14, 14),
        "patch_embed.proj.bias": draw(8),
        "norm.weight": draw(8),
        "head.weight": draw(10, 8),
    }
    for layer in range(2):
        p = f"blocks.{layer}."
        tensors |= {f"{p}norm{n}.{kind}": draw(8) for n in (1, 2) for kind in ("weight", "bias")}
        tensors |= {f"{p}attn.qkv.weight": draw(24, 8), f"{p}attn.qkv.bias": draw(24)}
        tensors |= {f"{p}attn.proj.weight": draw(8, 8), f"{p}attn.proj.bias": draw(8)}
        tensors |= {f"{p}mlp.fc1.weight": draw(12, 8), f"{p}mlp.fc1.bias": draw(12)}
        tensors |= {f"{p}mlp.fc2.weight": draw(8, 12), f"{p}mlp.fc2.bias": draw(8)}
        if scale:
            tensors |= {f"{p}{scale.format(n)}": draw(8) for n in (1, 2)}
    return tensors


@pytest.mark.parametrize("scale", ["", "gamma_{}", "ls{}.gamma"])
@pytest.mark.parametrize("has_class_row", [False, True])
def test_timm_weights_become_a_branch(tmp_path, has_class_row, scale):
    source = timm_model(has_class_row=has_class_row, scale=scale)
    save_file(source, tmp_path / "model.safetensors")
    found = branch_tensors(BRANCH, tmp_path / "model.safetensors", generator=torch.Generator())
    table = source["pos_embed"]
    rows = table[:, 1:] if has_class_row else table
    assert torch.equal(found["embeddings.position_embedding"][:, 1:], resize_positions(rows, (5, 5)))
    class_row = table[:, :1] if has_class_row else torch.zeros(1, 1, 8)
    assert torch.equal(found["embeddings.position_embedding"][:, :1], class_row)
    kernel = resize_patch_kernel(source["patch_embed.proj.weight"], 16)
    assert torch.equal(found["embeddings.patch_embedding.weight"], kernel)
    wanted = source[f"blocks.1.{scale.format(2)}"] if scale else torch.ones(8)
    assert torch.equal(found["encoder.layers.1.ls2"], wanted)
    assert torch.equal(found["encoder.layers.0.attn.qkv.weight"], source["blocks.0.attn.qkv.weight"])


def test_a_source_of_other_sizes_names_its_tensors(tmp_path):
    source = timm_model(has_class_row=True, scale="")
    source["blocks.0.mlp.fc1.bias"] = torch.zeros(13)
    del source["blocks.1.norm1.bias"]
    save_file(source, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.norm1.bias: missing") as error:
        branch_tensors(BRANCH, tmp_path / "model.safetensors", generator=torch.Generator())
    assert "encoder.layers.0.mlp.fc1.bias: has shape (13,), the recipe makes it (12,)" in str(error.value)


def test_a_folder_without_its_pyramids_tensors_is_not_imported(tmp_path):
    folder = pyramid_folder(tmp_path / "hf")
    tensors = load_file(folder / PYRAMID_FILE)
    gone = "vision_model.piip.branches.1.encoder.layers.2.ls2"
    del tensors[gone]
    save_file(tensors, folder / PYRAMID_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        import_hf(folder, tmp_path / "checkpoint")
    (folder / PYRAMID_FILE).unlink()
    with pytest.raises(CheckpointError, match=PYRAMID_FILE):
        import_hf(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_flops_of_a_published_pyramid(tmp_path):
    """GMAC of a tile, from the formulas of docs/piip.md: the golden tower alone, and its pyramid."""
    arch = read_architecture(pyramid_folder(tmp_path / "hf"))
    import dataclasses

    plain = dataclasses.replace(arch, pyramid=None)
    assert interaction_flops(plain, 3) == 0
    smaller = [dataclasses.replace(plain, vision=b, image_size=b.image_size) for b in arch.pyramid.branches]
    parts = tower_flops(plain, 1) + sum(tower_flops(each, 1) for each in smaller)
    assert tower_flops(arch, 1) == pytest.approx(parts + interaction_flops(arch, 1))
    assert interaction_flops(arch, 2) == 2 * interaction_flops(arch, 1) > 0
