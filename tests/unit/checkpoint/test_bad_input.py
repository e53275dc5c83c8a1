"""Each kind of broken folder is refused with its own message, and nothing is left at the target."""

import json
import shutil

import pytest
import torch

from megatron_v2pe.checkpoint.convert import import_hf as import_module
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files import staging
from megatron_v2pe.checkpoint.files.folder import is_complete, read_info, state_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN, edit_config, edit_weights, golden_copy, random_folder


@pytest.fixture
def golden(tmp_path):
    return golden_copy(tmp_path / "hf")


@pytest.fixture
def sharded(tmp_path):
    return random_folder(tmp_path / "hf", shards=3, dtype=torch.bfloat16, llm={"vocab_size": 50}, vision={})


def refusal(source, tmp_path) -> str:
    """Message of a refused import; the target must not exist in any form."""
    with pytest.raises(CheckpointError) as error:
        import_hf(source, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))
    return str(error.value)


def test_missing_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere", tmp_path)


def test_missing_shard(sharded, tmp_path):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded, tmp_path)
    assert (
        "model-00002-of-00003.safetensors: missing; model.safetensors.index.json names this file" in message
    )
    assert message.count("\n") == 1  # not one line for each tensor of the shard


def test_index_names_a_tensor_that_is_not_there(sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["mlp1.9.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    message = refusal(sharded, tmp_path)
    assert "names 'mlp1.9.weight' in model-00001-of-00003.safetensors, but it is not there" in message


def test_index_points_out_of_the_folder(sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of", "../model-00001-of"))
    assert "names files outside the folder: ../model-00001-of-00003.safetensors" in refusal(sharded, tmp_path)


def test_shards_without_index(sharded, tmp_path):
    (sharded / "model.safetensors.index.json").unlink()
    assert "3 safetensors files but no model.safetensors.index.json" in refusal(sharded, tmp_path)


@pytest.mark.parametrize(
    ("keep", "word"), [(600_000, "truncated"), (3000, "cut within its header"), (4, "cut within")]
)
def test_truncated_safetensors(golden, tmp_path, keep, word):
    path = golden / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert word in refusal(golden, tmp_path)


def test_garbage_in_the_header(golden, tmp_path):
    path = golden / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(data)
    assert "damaged safetensors header" in refusal(golden, tmp_path)


def test_wrong_shape(golden, tmp_path):
    edit_weights(golden, language_model__model__norm__weight=torch.ones(63))
    assert "language_model.model.norm.weight: has shape (63,), config.json makes it (64,)" in refusal(
        golden, tmp_path
    )


def test_missing_and_extra_tensors(golden, tmp_path):
    edit_weights(golden, mlp1__0__bias=None, mlp1__4__bias=torch.ones(3))
    message = refusal(golden, tmp_path)
    assert "mlp1.0.bias: missing" in message
    assert "mlp1.4.bias: this architecture has no such tensor" in message


def test_gate_and_up_of_different_dtypes(golden, tmp_path):
    up = torch.ones(128, 64, dtype=torch.bfloat16)
    edit_weights(golden, language_model__model__layers__0__feed_forward__w3__weight=up)
    assert "different dtypes, but together they are one parameter" in refusal(golden, tmp_path)


def test_other_family(golden, tmp_path):
    edit_config(golden, llm_config={"architectures": ["MambaForCausalLM"]})
    message = refusal(golden, tmp_path)
    assert "MambaForCausalLM" in message
    assert "InternLM2ForCausalLM" in message


def test_pickle_only(golden, tmp_path):
    (golden / "model.safetensors").rename(golden / "pytorch_model.bin")
    message = refusal(golden, tmp_path)
    assert "pickle" in message
    assert "safe_serialization" in message


def test_no_weights_at_all(golden, tmp_path):
    (golden / "model.safetensors").unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in refusal(golden, tmp_path)


def test_all_problems_are_reported_at_once(sharded, tmp_path):
    (sharded / "model-00001-of-00003.safetensors").unlink()
    (sharded / "model-00003-of-00003.safetensors").write_bytes(b"short")
    edit_config(sharded, vision_config={"intermediate_size": 7})
    message = refusal(sharded, tmp_path)
    assert "00001-of-00003.safetensors: missing" in message
    assert "00003-of-00003.safetensors: not a safetensors file" in message
    assert (
        "vision_model.encoder.layers.0.mlp.fc1.weight: has shape (96, 64), config.json makes it (7, 64)"
        in message
    )


def test_target_exists(golden, tmp_path):
    import_hf(golden, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=r"ckpt: exists already; .* --force"):
        import_hf(golden, tmp_path / "ckpt")
    assert import_hf(golden, tmp_path / "ckpt", force=True).kind == "import"
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(tmp_path / "ckpt", tmp_path / "back")
    export_hf(tmp_path / "ckpt", tmp_path / "back", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ckpt", "hf"]


def test_force_does_not_replace_a_foreign_folder(golden, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a Hugging Face folder"):
        import_hf(golden, photos, force=True)
    assert (photos / "cat.png").exists()


def test_too_little_room(golden, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GiB free" in refusal(golden, tmp_path)


def test_failure_while_writing_leaves_nothing(golden, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(import_module, "save_state", fail)
    with pytest.raises(CheckpointError, match=r"ckpt: cannot be written \(disk on fire\)"):
        import_hf(golden, tmp_path / "ckpt")
    assert not list(tmp_path.glob("ckpt*"))


def test_interrupted_import_is_no_checkpoint_and_can_be_repeated(golden, tmp_path):
    import_hf(golden, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "checkpoint.json").unlink()
    (tmp_path / "ckpt").rename(tmp_path / "ckpt.incomplete")  # what a killed writer leaves
    assert not is_complete(tmp_path / "ckpt.incomplete")
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json, .* interrupted"):
        read_info(tmp_path / "ckpt.incomplete")
    import_hf(golden, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt.incomplete").exists()


def test_hf_folder_given_as_checkpoint(golden, tmp_path):
    with pytest.raises(CheckpointError, match="import-hf turns it into a checkpoint"):
        export_hf(golden, tmp_path / "out")


@pytest.mark.parametrize("name", ["state/__0_0.distcp", "hf/tokenizer.model", "state/.metadata"])
def test_damaged_checkpoint_names_the_file(golden, tmp_path, name):
    import_hf(golden, tmp_path / "ckpt")
    path = tmp_path / "ckpt" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{name} has {size - 7} bytes instead of {size}"):
        export_hf(tmp_path / "ckpt", tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_info(tmp_path / "ckpt")


def test_unreadable_state_is_a_checkpoint_error(golden, tmp_path):
    import_hf(golden, tmp_path / "ckpt")
    state = state_path(tmp_path / "ckpt")
    data = state / "__0_0.distcp"
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(CheckpointError, match=r"projector\.norm\.weight cannot be read"):
        StateReader(state).read("projector.norm.weight")
    (state / ".metadata").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        StateReader(state)


@pytest.mark.parametrize(("version", "message"), [(3, "format 3 is newer"), (1, "format 1 is older")])
def test_other_formats(golden, tmp_path, version, message):
    import_hf(golden, tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "checkpoint.json"
    path.write_text(path.read_text().replace('"format_version": 2', f'"format_version": {version}'))
    with pytest.raises(CheckpointError, match=message):
        read_info(tmp_path / "ckpt")


def test_good_folder_has_no_problems():
    weights, arch, names = open_hf(GOLDEN)
    assert weights.problems == []
    assert len(names.by_hf) == len(weights.tensors) == 55
    assert arch.language.num_layers == 2


def test_command_line_codes(golden, tmp_path, capsys):
    ckpt = str(tmp_path / "ckpt")
    assert main(["import-hf", str(golden), ckpt]) == 0
    assert main(["verify", str(golden), ckpt]) == 0
    assert capsys.readouterr().out.endswith("equal\n")
    assert main(["import-hf", str(golden), ckpt]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export-hf", ckpt, str(tmp_path / "out"), "--max-shard-size", "lots"]) == 2
    assert "--max-shard-size" in capsys.readouterr().err
    assert main(["export-hf", ckpt, str(tmp_path / "out"), "--max-shard-size", "1MB"]) == 0
    edit_weights(golden, mlp1__0__bias=torch.zeros(256))
    assert main(["verify", str(golden), ckpt]) == 1


@pytest.mark.parametrize("verb", ["verify", "export-hf --adapter"])
def test_verbs_for_one_process_refuse_torchrun(golden, tmp_path, monkeypatch, capsys, verb):
    import_hf(golden, tmp_path / "ckpt")
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    given = [golden, tmp_path / "ckpt"] if verb == "verify" else [tmp_path / "ckpt", tmp_path / "out"]
    assert main([*verb.split(), *map(str, given)]) == 2
    assert f"{verb} runs in one process, 2 were started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
