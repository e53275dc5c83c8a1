"""A folder whose pyramid has LLaVA's readout: InternVL's projector leaves, tokens per tile follow, bytes round-trip."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE, add_pyramid
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import parse_architecture, read_architecture, require_consistent
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import edit_config, folder_bytes, golden_copy
from tests.support.piip import RECIPE, pyramid_folder, write_recipe
from tests.support.tiny import GOLDEN_HF

LLAVA = {"readout": "llava", "readout_grid": 5}


def test_import_and_export_give_the_folder_back_byte_for_byte(tmp_path):
    folder = pyramid_folder(tmp_path / "hf", **LLAVA)
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(folder)
    kept, before = load_file(folder / "model.safetensors"), load_file(GOLDEN_HF / "model.safetensors")
    assert {name for name in before if name not in kept} == {
        name for name in before if name.startswith("mlp1.")
    }
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert "mlp1" not in json.dumps(json.loads((folder / "model.safetensors.index.json").read_text()))
    new = load_file(folder / PYRAMID_FILE)
    assert {name for name in new if name.startswith("mm_projector.")} == {
        f"mm_projector.branch{branch}.{part}.{kind}"
        for branch in (1, 2, 3)
        for part in (1, 3, 6)
        for kind in ("weight", "bias")
    }
    # Every branch is read at the end, so the last interaction has both ways.
    assert any("interactions.1.interaction_units_23.branch1to2" in name for name in new)
    assert all(not x.any() for name, x in new.items() if name.endswith("_gamma"))


@pytest.mark.parametrize(
    ("changes", "tokens"), [({}, 14 * 14), ({"readout_grid": 5}, 25), ({"readout_norm": "ln"}, 14 * 14)]
)
def test_tokens_of_a_tile_are_the_cells_of_the_grid(tmp_path, changes, tokens):
    arch = read_architecture(pyramid_folder(tmp_path / "hf", readout="llava", **changes))
    assert arch.tokens_per_tile == tokens
    assert read_architecture(GOLDEN_HF).tokens_per_tile == 16


def test_the_verb_says_how_many_tokens_a_tile_has_now(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", **LLAVA)
    assert main(["add-piip", str(GOLDEN_HF), str(recipe), str(tmp_path / "out")]) == 0
    assert "25 tokens a tile (16 before) from a projector that is not trained yet" in capsys.readouterr().out


def test_a_folder_with_internvls_projector_beside_the_readout_is_not_imported(tmp_path):
    folder = pyramid_folder(tmp_path / "hf", **LLAVA)
    tensors = load_file(folder / PYRAMID_FILE)
    save_file({**tensors, "mlp1.0.weight": torch.ones(4)}, folder / PYRAMID_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp1\.0\.weight"):
        import_hf(folder, tmp_path / "checkpoint")


def test_a_stride_beyond_the_new_tokens_of_a_tile_is_named_first(tmp_path):
    """A fixed stride of 9/16 has no place in 4 tokens a tile: positions of a tile may not exceed those of its text."""
    source = golden_copy(tmp_path / "fixed")
    edit_config(source, rope_pos_id_version="v2pe_fix", rope_pos_id_stride=9)
    recipe = write_recipe(tmp_path / "recipe.yaml", readout="llava", readout_grid=2)
    with pytest.raises(CheckpointError, match=r"rope_pos_id_stride 9 must be at most the 4 visual tokens"):
        add_pyramid(source, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_of_the_readout_divide_the_language_models_width():
    config = json.loads((GOLDEN_HF / "config.json").read_text())
    config["llm_config"] |= {"hidden_size": 48}
    recipe = json.loads(json.dumps({**RECIPE, "readout": "llava"}))
    for branch in recipe["branches"]:
        del branch["weights"]
    with pytest.raises(
        CheckpointError, match=r"llm hidden_size 48 must be a multiple of 32 for the GroupNorm"
    ):
        require_consistent(parse_architecture({**config, "piip_config": recipe}))
    require_consistent(parse_architecture({**config, "piip_config": {**recipe, "readout_norm": "ln"}}))
