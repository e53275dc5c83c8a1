"""PEFT folders come in as they went out, for every family; what training here cannot do is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.adapters.peft_export import CONFIG_FILE, PREFIX, WEIGHTS_FILE, export_peft
from megatron_v2pe.checkpoint.adapters.peft_import import import_peft
from megatron_v2pe.checkpoint.adapters.peft_names import PeftModules
from megatron_v2pe.checkpoint.adapters.weights import adapted_linears
from megatron_v2pe.checkpoint.convert.exported_tensors import ExportedTensors
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.adapter_record import read_record
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import LoRAConfig
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import FAMILIES_GOLDEN, GOLDEN

FAMILIES = sorted(path.name for path in GOLDEN.parent.iterdir() if (path / "model.safetensors").is_file())
NATIVE = (
    FAMILIES_GOLDEN / "ckpt_hf" / "i_qwen3_vit6b"
)  # nested names, so that exported ones are modules' names
LORA = {"language_rank": 3, "vision_rank": 2, "projector_rank": 2}


def peft_folder(folder, arch, *, targets=(), **config):
    """Random adapters with PEFT's names, alphas twice the ranks; as PEFT would write them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    lora = LoRAConfig(**LORA, targets=targets)
    tensors, names = {}, {}
    for linear in adapted_linears(lora, arch):
        rank = lora.rank_of(linear.part)
        rows, columns = linear.hf_shape
        stem = f"{PREFIX}{linear.hf_name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
        names[linear.target] = rank
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": list(names),
        "rank_pattern": {name: 2 for name, rank in names.items() if rank == 2},
        "alpha_pattern": {name: 4 for name, rank in names.items() if rank == 2},
        "bias": "none",
    }
    (folder / CONFIG_FILE).write_text(json.dumps({**values, **config}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    import_hf(GOLDEN, folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out_again(family, tmp_path):
    """The same tensors come back, and what is merged is W + 2 B A under Hugging Face names."""
    import_hf(GOLDEN.parent / family, tmp_path / "base")
    arch = read_architecture(hf_path(tmp_path / "base"))
    source = peft_folder(tmp_path / "peft", arch)
    import_peft(source, tmp_path / "adapters", base=tmp_path / "base")
    assert read_record(tmp_path / "adapters").lora == LoRAConfig(**LORA)
    export_peft(tmp_path / "adapters", tmp_path / "again")
    given, back = load_file(source / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert set(given) == set(back)
    assert [name for name in given if not torch.equal(given[name], back[name])] == []
    config = json.loads((tmp_path / "again" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    exported, original = ExportedTensors(tmp_path / "adapters"), ExportedTensors(tmp_path / "base")
    for linear in adapted_linears(LoRAConfig(**LORA), arch):
        a, b = (given[f"{PREFIX}{linear.hf_name}.lora_{kind}.weight"] for kind in "AB")
        weight = original.read(f"{linear.hf_name}.weight")
        wanted = (weight.double() + 2 * b.double() @ a.double()).to(weight.dtype)
        torch.testing.assert_close(exported.read(f"{linear.hf_name}.weight"), wanted, rtol=1e-5, atol=1e-5)


def native_names(folder):
    """A PEFT folder of GitHub names under transformers' names, fused queries, keys and values apart."""
    arch, tensors = read_architecture(NATIVE), load_file(folder / WEIGHTS_FILE)
    modules, renamed = PeftModules.of(arch), {}
    for linear in adapted_linears(LoRAConfig(**LORA), arch):
        a, b = (tensors[f"{PREFIX}{linear.hf_name}.lora_{kind}.weight"] for kind in "AB")
        names, parts = modules.names(linear), modules.split(linear, b)
        for name, part in zip(names, parts, strict=True):
            renamed[f"{PREFIX}{name}.lora_A.weight"] = a.clone()
            renamed[f"{PREFIX}{name}.lora_B.weight"] = part.contiguous()
    save_file(renamed, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text())
    small = [r".*vision_tower\..*", r".*multi_modal_projector\..*"]
    config["rank_pattern"], config["alpha_pattern"] = dict.fromkeys(small, 2), dict.fromkeys(small, 4)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return renamed


def test_under_the_names_of_a_native_model(tmp_path):
    """Every module is one of transformers' InternVL; its weight and 2 B A make what is exported merged."""
    import_hf(NATIVE, tmp_path / "base")
    source = peft_folder(tmp_path / "peft", read_architecture(NATIVE))
    given = native_names(source)
    assert f"{PREFIX}model.vision_tower.encoder.layer.1.attention.k_proj.lora_B.weight" in given
    assert f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in given
    import_peft(source, tmp_path / "adapters", base=tmp_path / "base")
    assert read_record(tmp_path / "adapters").lora == LoRAConfig(**LORA)
    export_peft(tmp_path / "adapters", tmp_path / "again")
    back = load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert set(given) == set(back)
    assert [name for name in given if not torch.equal(given[name], back[name])] == []
    config = json.loads((tmp_path / "again" / CONFIG_FILE).read_text())
    assert {"self_attn.q_proj", "attention.q_proj", "multi_modal_projector.linear_2"} <= set(
        config["target_modules"]
    )
    exported, original = ExportedTensors(tmp_path / "adapters"), ExportedTensors(tmp_path / "base")
    for name in given:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            weight = original.read(f"{module}.weight")
            b, a = given[name.replace("lora_A", "lora_B")], given[name]
            wanted = (weight.double() + 2 * b.double() @ a.double()).to(weight.dtype)
            # One rounding to bfloat16 apart, whose sums were made in float32 and in float64.
            torch.testing.assert_close(exported.read(f"{module}.weight"), wanted, rtol=2**-7, atol=1e-5)


def test_three_modules_with_different_a_are_refused(tmp_path):
    import_hf(NATIVE, tmp_path / "base")
    source = peft_folder(tmp_path / "peft", read_architecture(NATIVE))
    tensors = native_names(source)
    tensors[f"{PREFIX}model.vision_tower.encoder.layer.0.attention.k_proj.lora_A.weight"] += 1
    save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="have different A, but are one linear here"):
        import_peft(source, tmp_path / "adapters", base=tmp_path / "base")


def test_some_targets_and_one_alpha(base, tmp_path):
    arch = read_architecture(hf_path(base))
    source = peft_folder(
        tmp_path / "peft", arch, targets=("wqkv", "attn.qkv", "mlp1.1"), lora_alpha=5, alpha_pattern={}
    )
    assert main(["import-hf", str(source), str(tmp_path / "adapters"), "--base", str(base)]) == 0
    lora = read_record(tmp_path / "adapters").lora
    assert lora == LoRAConfig(**LORA, alpha=5.0, targets=("wqkv", "attn.qkv", "mlp1.1"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True, "bias": "all"}, "(?s)bias is 'all'.*use_dora"),
        ({"modules_to_save": ["mlp1"]}, "modules_to_save"),
        ({"alpha_pattern": {"wqkv": 9}}, "the language has ranks .* and alphas"),
        ({"lora_alpha": 7}, "neither one number nor twice the ranks"),
    ],
)
def test_other_settings_are_refused(base, tmp_path, config, message):
    source = peft_folder(tmp_path / "peft", read_architecture(hf_path(base)), **config)
    with pytest.raises(CheckpointError, match=message):
        import_peft(source, tmp_path / "adapters", base=base)
    assert not list(tmp_path.glob("adapters*"))


def test_other_tensors_are_refused_all_at_once(base, tmp_path):
    source = peft_folder(tmp_path / "peft", read_architecture(hf_path(base)))
    tensors = load_file(source / WEIGHTS_FILE)
    stem = f"{PREFIX}language_model.model.layers.0."
    del tensors[f"{stem}attention.wqkv.lora_B.weight"]
    tensors[f"{stem}attention.q_proj.lora_A.weight"] = torch.zeros(3, 64)
    tensors[f"{stem}attention.wo.lora_A.weight"] = torch.zeros(3, 5)
    save_file(tensors, source / WEIGHTS_FILE)
    with pytest.raises(CheckpointError) as caught:
        import_peft(source, tmp_path / "adapters", base=base)
    for part in (
        "q_proj.lora_A.weight: no linear",
        "wqkv.lora_B.weight: missing",
        "attention.wo: shapes do not",
    ):
        assert part in str(caught.value)
    for kind in "AB":
        del tensors[f"{stem}feed_forward.w1.lora_{kind}.weight"]
    tensors[f"{stem}attention.wqkv.lora_B.weight"] = torch.zeros(128, 3)
    del tensors[f"{stem}attention.q_proj.lora_A.weight"]
    tensors[f"{stem}attention.wo.lora_A.weight"] = torch.zeros(3, 64)
    save_file(tensors, source / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"missing in some layers:\n.*layers.0.feed_forward.w1"):
        import_peft(source, tmp_path / "adapters", base=base)


def test_a_folder_that_is_no_peft_folder(base, tmp_path, capsys):
    shutil.copytree(GOLDEN, tmp_path / "hf")
    assert main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "out"), "--base", str(base)]) == 2
    assert "--base is for PEFT folders" in capsys.readouterr().err
