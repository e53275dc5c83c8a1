"""Files that are written in blocks hold what was put, have the right hash, and an error of a thread is not lost."""

import errno
import hashlib
import os

import pytest
import torch

from megatron_v2pe.checkpoint.files import block_stream
from megatron_v2pe.checkpoint.files.block_stream import Block, BlockStream, memory_blocks


def counted(num_bytes, value):
    def fill(memory):
        return memory.fill_(value)

    return Block(num_bytes, fill)


def test_files_hold_what_was_put_in_order_and_hashes_are_theirs(tmp_path):
    # More blocks than buffers, so that buffers are used again; one block that is larger than a buffer.
    sizes = [7, 100, 64, 0, 1000, 64, 64, 3]
    with BlockStream(block_bytes=64, num_buffers=2) as stream:
        digests = []
        for i in range(3):
            stream.open(tmp_path / str(i), is_hashed=i < 2)
            stream.put(b"head")
            stream.put_blocks(counted(size, i + j) for j, size in enumerate(sizes))
            stream.put(b"tail")
            digests.append(stream.close())
    for i in range(3):
        wanted = b"head" + b"".join(bytes([i + j]) * size for j, size in enumerate(sizes)) + b"tail"
        assert (tmp_path / str(i)).read_bytes() == wanted
        assert digests[i].result() == (hashlib.sha256(wanted).hexdigest() if i < 2 else "")


def test_a_place_may_be_chosen_and_nothing_else_of_the_file_changes(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    with BlockStream() as stream:
        stream.open(tmp_path / "file")
        stream.position = 4
        stream.put(b"ab")
        stream.close()
    assert (tmp_path / "file").read_bytes() == b"0123ab6789"


def test_flushing_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(block_stream, "FLUSH_BYTES", 100)
    flushed = []
    monkeypatch.setattr(block_stream.os, "fdatasync", flushed.append)
    with BlockStream(block_bytes=50) as stream:
        stream.open(tmp_path / "file")
        stream.put_blocks(counted(50, 1) for _ in range(20))
        stream.close()
    assert flushed
    assert (tmp_path / "file").stat().st_size == 1000


def test_an_error_while_writing_is_raised_and_descriptors_are_closed(tmp_path, monkeypatch):
    def full(descriptor, data, position):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_stream.os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"), BlockStream(num_buffers=2) as stream:  # noqa: PT012
        stream.open(tmp_path / "file")
        stream.put_blocks(counted(10, 0) for _ in range(5))
        stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_while_flushing_is_raised(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(block_stream.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"), BlockStream() as stream:  # noqa: PT012
        stream.open(tmp_path / "file")
        stream.put(b"data")
        stream.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24, dtype=torch.float32).view(6, 4),
        torch.arange(24, dtype=torch.float32).view(6, 4).t(),
        torch.arange(48).view(8, 6)[2:5, 1:],
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 3),
        torch.ones(5, dtype=torch.bfloat16),
    ],
)
def test_a_tensor_of_any_strides_becomes_its_bytes_row_by_row(tensor):
    blocks = [
        block.fill(torch.empty(block.num_bytes, dtype=torch.uint8))
        for block in memory_blocks(tensor, block_bytes=40)
    ]
    wanted = tensor.contiguous().reshape(-1).view(torch.uint8)
    found = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8)
    assert torch.equal(found, wanted)
