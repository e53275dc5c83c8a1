"""checkpoint.json knows every other file: each kind of damage is found and named, at the level that can see it."""

import hashlib
import json

import pytest

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files import hashing
from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.files.hashing import (
    FileRecord,
    find_damage,
    record_files,
    sha256_file,
    sha256_files,
)
from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN


@pytest.fixture
def ckpt(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def largest_file(ckpt):
    files = read_info(ckpt).files
    return max(files, key=lambda name: files[name].num_bytes)


def flip_bit(path, position=-5):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_sizes_and_hashes_are_those_of_the_files(ckpt):
    files = read_info(ckpt, verify="full").files
    assert "hf/config.json" in files
    assert any(name.startswith("state/") for name in files)
    for name, record in files.items():
        data = (ckpt / name).read_bytes()
        assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())


def test_a_large_file_is_hashed_in_blocks(tmp_path):
    data = bytes(range(256)) * 40_000  # two blocks and a half
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"")
    expected = [hashlib.sha256(text).hexdigest() for text in (data, b"")]
    assert list(sha256_files([tmp_path / "a", tmp_path / "b"]).values()) == expected
    assert sha256_file(tmp_path / "a") == expected[0]


@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_missing_cut_and_grown_files_are_named_together(ckpt, verify):
    largest = ckpt / largest_file(ckpt)
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[:-1])
    (ckpt / "hf" / "tokenizer.model").unlink()
    with (ckpt / "hf" / "config.json").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(CheckpointError) as error:
        read_info(ckpt, verify=verify)
    message = str(error.value)
    assert str(ckpt) in message
    assert f"{largest.relative_to(ckpt)} has {size - 1} bytes instead of {size}" in message
    assert "hf/tokenizer.model is missing" in message
    assert "hf/config.json has" in message


@pytest.fixture
def no_file_is_small(monkeypatch):
    """As if every file were larger than those that are hashed always."""
    monkeypatch.setattr(hashing, "SMALL_BYTES", 0)


def test_a_flipped_bit_of_a_large_file_is_found_by_full_alone(no_file_is_small, ckpt):
    name = largest_file(ckpt)
    flip_bit(ckpt / name, 5000)  # between two sampled blocks
    read_info(ckpt, verify="sizes")
    with pytest.raises(CheckpointError, match=f"{name} has the right size but other contents"):
        read_info(ckpt, verify="full")


@pytest.mark.parametrize(
    "name", ["state/metadata.json", "state/common.pt", "state/.metadata", "hf/config.json"]
)
def test_a_flipped_bit_of_a_small_file_is_always_found(ckpt, name):
    flip_bit(ckpt / name)
    with pytest.raises(CheckpointError, match=f"{name} has the right size but other contents"):
        read_info(ckpt)


def test_tensors_of_another_step_are_found_by_their_sample(no_file_is_small, ckpt):
    """Both files are whole and of one size; only what they hold differs, as weights of two steps do."""
    name = largest_file(ckpt)
    data = bytearray((ckpt / name).read_bytes())
    (ckpt / name).write_bytes(bytes(byte ^ 1 if i > 4096 else byte for i, byte in enumerate(data)))
    with pytest.raises(CheckpointError, match=f"{name} has the right size but is another file"):
        read_info(ckpt)


def test_a_sample_sees_the_first_and_the_last_byte_and_any_long_change(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1_000_000))
    whole = hashing.sample_of(path)
    for place in (0, -1):
        flip_bit(path, place)
        assert hashing.sample_of(path) != whole
        flip_bit(path, place)
    assert hashing.sample_of(path) == whole
    data = bytearray(path.read_bytes())
    data[300_000:400_000] = b"1" * 100_000
    path.write_bytes(data)
    assert hashing.sample_of(path) != whole


def rewrite(ckpt, change):
    """Edit checkpoint.json and give it its own hash again."""
    path = ckpt / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256_of_this"]
    change(values)
    path.write_text(json.dumps({**values, "sha256_of_this": hashing.digest_of(values)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(step="3"),
        lambda values: values.update(step=-1),
        lambda values: values.update(kind="other"),
        lambda values: values.update(files=[]),
        lambda values: values.update(format_version="2"),
        lambda values: values["files"].update({"../x": {"num_bytes": 1, "sha256": ""}}),
        lambda values: values["files"].update({"/etc/passwd": {"num_bytes": 1, "sha256": ""}}),
        lambda values: values["files"].update({"x": {"num_bytes": "1", "sha256": ""}}),
        lambda values: values.update(run_state={"step": 7}),
        lambda values: values.update(topology=3),
    ],
)
def test_values_of_wrong_types_are_damage(ckpt, change):
    rewrite(ckpt, change)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
        read_info(ckpt)


def test_a_folder_named_after_another_step_is_refused(ckpt):
    rewrite(ckpt, lambda values: values.update(kind="train", step=3, run_state={"step": 3}))
    right, wrong = ckpt.with_name("step_00000003"), ckpt.with_name("step_00000004")
    ckpt.rename(right)
    assert read_info(right).step == 3
    right.rename(wrong)
    with pytest.raises(CheckpointError, match="is named after step 4, but holds step 3"):
        read_info(wrong)


def test_files_are_shared_out_so_that_each_is_hashed_once(ckpt):
    """Three processes: exactly one of them finds the damage, whichever file it is in."""
    files = read_info(ckpt).files
    for name, record in files.items():
        if record.num_bytes == 0:
            continue
        flip_bit(ckpt / name, 0)
        found = [find_damage(ckpt, files, verify="full", rank=rank, world_size=3) for rank in range(3)]
        assert sorted(len(problems) for problems in found) == [0, 0, 1]
        flip_bit(ckpt / name, 0)


def test_known_hashes_are_used_and_the_rest_is_hashed(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    records = record_files(tmp_path, tmp_path.iterdir(), known={"a": "given"})
    assert records["a"] == FileRecord(1, "given")
    assert records["b"] == FileRecord(1, hashlib.sha256(b"2").hexdigest())


def test_checkpoint_json_has_its_own_hash(ckpt):
    path = ckpt / "checkpoint.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))  # other white space is no damage
    assert read_info(ckpt).step == 0
    path.write_text(json.dumps({**values, "step": 7}))
    with pytest.raises(CheckpointError, match="damaged, or edited by hand"):
        read_info(ckpt)
    del values["sha256_of_this"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="damaged, or edited by hand"):
        read_info(ckpt)


@pytest.mark.parametrize("verb", ["export-hf", "verify", "generate", "evaluate"])
def test_verbs_that_read_a_checkpoint_can_verify_every_byte(ckpt, tmp_path, capsys, verb):
    name = largest_file(ckpt)
    flip_bit(ckpt / name)
    arguments = {
        "export-hf": [str(ckpt), str(tmp_path / "out")],
        "verify": [str(GOLDEN), str(ckpt)],
        "generate": [str(ckpt), "What is it?"],
        "evaluate": [str(ckpt), "--data", "none.jsonl", "--out", str(tmp_path / "eval")],
    }
    assert main([verb, *arguments[verb], "--verify-checkpoint", "full"]) == 2
    assert f"{name} has the right size but other contents" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
