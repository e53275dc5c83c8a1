"""`.metadata` is read as torch reads it, and runs nothing; what is no metadata is a CheckpointError."""

import pickle
import pickletools
import random
import time

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.state.load import load_state
from megatron_v2pe.checkpoint.state.metadata_file import read_metadata
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import GOLDEN
from tests.support.hostile import Trap


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata") / "ckpt"
    import_hf(GOLDEN, folder)
    return state_path(folder)


def test_it_is_what_torch_reads(imported):
    ours, theirs = read_metadata(imported), FileSystemReader(imported).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_trap_does_not_spring(tmp_path, protocol):
    content = pickle.dumps(Metadata({"x": Trap(tmp_path / "sprung")}), protocol=protocol)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"\.metadata: damaged .*names posix\.mkdir, which no checkpoint needs"
    ):
        read_metadata(tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(content)  # it is one: plain pickle runs it
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"ctorch\nload\n(S'/etc/passwd'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch.serialization\n_get_layout.__globals__\n.",
        b"\x80\x04\x8c\x05torch\x8c\x0dSize.__class__\x93.",
        b"\x80\x05\x96\xff\xff\xff\xff\x07\x00\x00\x00.",  # a bytearray of 32 GiB
        b"r\xff\xff\xff\xff.",  # memo 4,294,967,295
        b"(" * 100_000 + b".",
        b"]" * 200_000 + b"a" * 199_999 + b".",
        b"ctorch\nSize\n}S'a'\nI1\nsb.",  # state for a class instead of an object
        b"",
    ],
)
def test_what_is_no_metadata_is_named(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        read_metadata(tmp_path)
    assert time.monotonic() - started < 30


def test_flipped_bits_are_named_or_harmless(imported, tmp_path):
    """300 files with a changed byte: each is read as something of the right types, or refused by name."""
    whole = (imported / ".metadata").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        place = generator.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        (tmp_path / ".metadata").write_bytes(changed)
        try:
            read_metadata(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_only_opcodes_of_the_writer_are_known(imported):
    from megatron_v2pe.checkpoint.state import metadata_file

    used = {
        code.code.encode("latin-1")[0]
        for code, _, _ in pickletools.genops((imported / ".metadata").read_bytes())
    }
    known = set(metadata_file._Unpickler.dispatch)
    assert used <= known
    assert not {ord(c) for c in "iPQo"} & known  # INST, PERSID, BINPERSID, OBJ


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "..", "a/b"])
def test_files_outside_the_folder_are_refused(imported, tmp_path, name):
    metadata = FileSystemReader(imported).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="a file outside the folder"):
        read_metadata(tmp_path)


def test_a_box_beyond_its_tensor_is_refused(imported, tmp_path):
    metadata = FileSystemReader(imported).read_metadata()
    stored = next(iter(metadata.state_dict_metadata.values()))
    stored.chunks[0].sizes = torch.Size([2 * size for size in stored.chunks[0].sizes])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="beyond its tensor"):
        read_metadata(tmp_path)


def saved(folder, value):
    folder.mkdir()
    save_state(folder, {"o": ShardedObject("o", value, (1,), (0,)), "plain": {"step": 3}})
    return {"o": ShardedObject("o", None, (1,), (0,))}


def test_an_object_of_plain_values_comes_back(tmp_path):
    value = {"python": (3, (1, 2), None), "torch": torch.arange(4)}
    with ensure_process_group():
        loaded = load_state(tmp_path / "state", saved(tmp_path / "state", value))
    assert loaded["o"]["python"] == value["python"]
    assert loaded["plain"] == {"step": 3}
    assert torch.equal(loaded["o"]["torch"], value["torch"])


def test_a_trap_in_an_object_of_the_state_does_not_spring(tmp_path):
    with ensure_process_group():
        request = saved(tmp_path / "state", Trap(tmp_path / "sprung"))
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_state(tmp_path / "state", request)
    assert not (tmp_path / "sprung").exists()


def test_a_trap_in_common_state_does_not_spring_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with ensure_process_group():
        request = saved(tmp_path / "state", 1)
        torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "state" / "common.pt")
        with pytest.raises(CheckpointError, match=r"common\.pt: damaged, or more than plain values"):
            load_state(tmp_path / "state", request)
    assert not (tmp_path / "sprung").exists()
