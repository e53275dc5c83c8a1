"""Folders that hold something else than weights of ours: recognised by what is there, and named once."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.tensor_files import read_header
from megatron_v2pe.checkpoint.hf import weight_files
from megatron_v2pe.checkpoint.hf.foreign_names import foreign_names
from megatron_v2pe.checkpoint.hf.pickle_files import read_pickle
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import golden_copy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n"
EXPECTED = [f"vision_model.layers.{n}.w" for n in range(8)] + [
    f"language_model.model.layers.{n}.w" for n in range(8)
]


@pytest.fixture
def golden(tmp_path):
    return golden_copy(tmp_path / "hf")


def refusal(source, tmp_path, **options):
    with pytest.raises(CheckpointError) as error:
        import_hf(source, tmp_path / "target", **options)
    assert not list(tmp_path.glob("target*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("global_step10/mp_rank_00_model_states.pt", "global_step10 is a DeepSpeed checkpoint"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "__0_0.distcp is a distributed checkpoint"),
        ("model.gguf", "model.gguf is GGUF weights"),
        ("model.safetensors.incomplete", "a download that was not finished"),
        ("checkpoint-500/model.safetensors", "give one of its checkpoint-* folders"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(golden, tmp_path, name, message):
    (golden / "model.safetensors").unlink()
    (golden / name).parent.mkdir(exist_ok=True)
    (golden / name).write_bytes(b"x")
    assert message in refusal(golden, tmp_path)


def test_a_large_file_is_not_copied_into_every_checkpoint(golden, tmp_path, monkeypatch):
    """A file with holes has any size; copied, it fills the disk."""
    with (golden / "notes.txt").open("wb") as file:
        file.truncate(2**40)
    assert "notes.txt: has 1,099,511,627,776 bytes" in refusal(golden, tmp_path)
    (golden / "notes.txt").write_text("small")
    monkeypatch.setattr(weight_files, "MAX_SIDE_BYTES", 4)
    assert "notes.txt: has 5 bytes" in refusal(golden, tmp_path)


def test_a_pointer_among_the_side_files_is_found(golden, tmp_path):
    (golden / "generation_config.json").write_bytes(POINTER)
    assert "generation_config.json: is a git-lfs pointer" in refusal(golden, tmp_path)


def test_quantised_weights_are_named_once(golden, tmp_path):
    path = golden / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {k: v.to(torch.int8) if v.ndim == 2 else v for k, v in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    message = refusal(golden, tmp_path)
    assert "tensors hold whole numbers" in message
    assert len(message.splitlines()) < 4


def test_dtypes_that_are_not_read_are_no_damage(tmp_path):
    save_file({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds tensors of F8_E4M3, which are not read here"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "state",
    [
        {1: torch.ones(2)},
        {"a": torch.ones(3, 3).to_sparse()},
        {"a": torch.ones(1).expand(10**9)},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.ones(2, device="meta")},
        {"model": {"a": torch.ones(2)}},
    ],
    ids=["key", "sparse", "expanded", "complex", "meta", "nested"],
)
def test_only_plain_tensors_with_names_are_read_from_pickles(tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="is no tensor that holds its values under a name"):
        read_pickle(tmp_path / "a.bin")


def test_damaged_pickles_are_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    content = (tmp_path / "a.bin").read_bytes()
    for place in range(0, len(content), 7):
        (tmp_path / "b.bin").write_bytes(
            content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        )
        with contextlib.suppress(CheckpointError):  # anything else fails the test
            assert set(read_pickle(tmp_path / "b.bin"))


@pytest.mark.parametrize(
    ("spell", "prefix"),
    [
        (lambda name: f"policy.model.{name}", "policy.model."),
        (lambda name: f"actor.module.net.{name}", "actor.module.net."),
        (
            lambda name: name.replace("language_model.", "language_model.base_model.model."),
            "base_model.model.",
        ),
    ],
    ids=["two parts", "three parts", "within one half"],
)
def test_prefixes_of_several_parts_and_within_names(spell, prefix):
    said = foreign_names([spell(name) for name in EXPECTED], EXPECTED)
    assert f"names have {prefix!r} in front of, or within" in said


def test_right_names_and_others_are_left_to_the_list():
    assert foreign_names(EXPECTED, EXPECTED) == ""
    assert foreign_names([*EXPECTED, *(f"ema.{name}" for name in EXPECTED)], EXPECTED) == ""
    assert foreign_names([f"x{n}.y" for n in range(16)], EXPECTED) == ""


def test_an_index_that_leads_out_of_the_folder_is_named(golden, tmp_path):
    (golden / "model.safetensors").rename(tmp_path / "x.safetensors")
    weight_map = {"a": "../x.safetensors", "b": "/etc/passwd", "c": "..", "d": "a/b.safetensors"}
    (golden / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(golden, tmp_path)
    assert "names files outside the folder: ../x.safetensors, /etc/passwd, a/b.safetensors" in message
