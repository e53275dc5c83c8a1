"""--dtype, --allow-pickle, NaN in weights, progress: what is asked for is done, and said."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress, progress_line
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN, edit_weights, folder_bytes, golden_copy, random_folder

NORM = "language_model.model.norm.weight"
WO = "language_model.model.layers.0.attention.wo.weight"


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_dtypes(folder):
    config = json.loads((folder / "config.json").read_text())
    return {
        config["torch_dtype"],
        config["llm_config"]["torch_dtype"],
        config["vision_config"]["torch_dtype"],
    }


@pytest.mark.parametrize("key", ["a_internlm2_vit300m", "c_qwen2_vit300m"])
def test_cast_on_import_is_torchs_cast_and_is_stated(tmp_path, key):
    source = GOLDEN.parent / key
    import_hf(source, tmp_path / "ckpt", dtype="bfloat16")
    assert read_info(tmp_path / "ckpt").dtype == "bfloat16"
    assert json.loads((tmp_path / "ckpt" / "checkpoint.json").read_text())["dtype"] == "bfloat16"
    state = StateReader(state_path(tmp_path / "ckpt"))
    assert {info.dtype for info in state.tensors.values()} == {torch.bfloat16}
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    found, wanted = weights(tmp_path / "back"), weights(source)
    assert all(torch.equal(found[name], wanted[name].to(torch.bfloat16)) for name in wanted)
    assert config_dtypes(tmp_path / "back") == {"bfloat16"}
    assert import_hf(source, tmp_path / "plain").dtype == "keep"


def test_cast_on_export_and_back_is_exact_when_it_widens(tmp_path):
    source = random_folder(tmp_path / "hf", shards=2, dtype=torch.bfloat16, llm={"vocab_size": 50}, vision={})
    import_hf(source, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in weights(tmp_path / "wide").values()} == {torch.float32}
    assert config_dtypes(tmp_path / "wide") == {"float32"}
    import_hf(tmp_path / "wide", tmp_path / "again", dtype="bfloat16")
    export_hf(tmp_path / "again", tmp_path / "back")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found, wanted = folder_bytes(tmp_path / "back"), folder_bytes(source)
    assert all(found[name] == wanted[name] for name in names)


def test_nan_and_inf_are_counted_by_name_and_kept(tmp_path, caplog):
    source = golden_copy(tmp_path / "hf")
    norm, wo = (load_file(source / "model.safetensors")[name] for name in (NORM, WO))
    norm[3], wo[0, :5] = float("nan"), float("-inf")
    edit_weights(source, **{NORM.replace(".", "__"): norm, WO.replace(".", "__"): wo})
    with caplog.at_level(logging.WARNING, logger="megatron_v2pe"):
        import_hf(source, tmp_path / "ckpt")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.splitlines() == [
        "6 values in 2 tensors are NaN or infinite:",
        f"  {WO}: 5 values",
        f"  {NORM}: 1 values",
    ]
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(source)


def test_what_float16_cannot_hold_is_said(tmp_path, caplog):
    source = golden_copy(tmp_path / "hf")
    edit_weights(source, **{NORM.replace(".", "__"): torch.full((64,), 70_000.0)})
    with caplog.at_level(logging.WARNING, logger="megatron_v2pe"):
        import_hf(source, tmp_path / "plain")
        assert not caplog.records
        import_hf(source, tmp_path / "ckpt", dtype="float16")
    assert f"{NORM}: 64 values (after the cast to float16)" in caplog.text


def pickled_folder(folder, *, files):
    """The golden folder with its weights in pickle files."""
    golden_copy(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[i::files] for i in range(files)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = "pytorch_model.bin" if files == 1 else f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("files", [1, 3])
def test_allowed_pickles_become_safetensors(tmp_path, files):
    source = pickled_folder(tmp_path / "hf", files=files)
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model.*--allow-pickle"):
        import_hf(source, tmp_path / "ckpt")
    assert main(["import-hf", str(source), str(tmp_path / "ckpt"), "--allow-pickle"]) == 0
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    found, wanted = weights(tmp_path / "back"), weights(GOLDEN)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    shards = {f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)}
    expected = {"model.safetensors"} if files == 1 else shards | {"model.safetensors.index.json"}
    assert {name for name in names if "model." in name or "model-" in name} - {"tokenizer.model"} == expected


class RunsCode:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle was run')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": RunsCode()}, "not a file of tensors alone"),
        ({"a": 3}, "'a' is no tensor"),
        ([1], "is no tensor"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, message):
    source = pickled_folder(tmp_path / "hf", files=1)
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        import_hf(source, tmp_path / "ckpt", allow_pickle=True)
    assert not list(tmp_path.glob("ckpt*"))


def test_a_missing_pickle_is_named(tmp_path):
    source = pickled_folder(tmp_path / "hf", files=3)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"00002-of-00003.bin: missing; pytorch_model.bin.index.json names"
    ):
        import_hf(source, tmp_path / "ckpt", allow_pickle=True)


def test_progress_counts_every_byte(tmp_path):
    done, expected = [], []
    import_hf(GOLDEN, tmp_path / "ckpt", progress=done.append, expect=expected.append)
    assert [sum(done)] == expected == [272_832 * 4]
    done, expected = [], []
    export_hf(
        tmp_path / "ckpt", tmp_path / "back", dtype="bfloat16", progress=done.append, expect=expected.append
    )
    assert [sum(done)] == expected == [272_832 * 2]


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("megatron_v2pe.checkpoint.files.byte_progress.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, logger="megatron_v2pe"):
        progress, silent = ByteProgress("import-hf"), ByteProgress("import-hf", rank=1)
        for each in (progress, silent):
            each.expect(4 * 10**9)
        for _ in range(4):
            now[0] += 5
            progress(500_000_000)
            silent(500_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "import-hf: 1.50 of 4.00 GB, 100 MB/s, 25 s left"
    ]
    assert progress_line("verify", 10**9, 0, 2.0) == "verify: 1.00 GB, 500 MB/s"
