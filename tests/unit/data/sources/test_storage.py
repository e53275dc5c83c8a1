"""Paths and addresses: what is read, what is refused, and that failures look alike."""

import importlib.util

import fsspec
import pytest

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.sources import storage


@pytest.fixture
def memory():
    """Address of a store in memory, emptied afterwards."""
    store = fsspec.filesystem("memory")
    yield "memory://bucket"
    store.rm("/bucket", recursive=True) if store.exists("/bucket") else None


def put(address, content):
    with fsspec.open(address, "wb") as file:
        file.write(content)


@pytest.fixture(params=["local", "file", "memory"])
def root(request, tmp_path):
    """One root of each kind."""
    if request.param == "memory":
        return request.getfixturevalue("memory")
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


def test_lines_at_their_offsets(root):
    put(f"{root}/a.jsonl", b"one\ntwo\n\nlast")
    path = storage.resolve_path(root, "sub/../a.jsonl", where="x")
    assert [storage.read_line(path, offset) for offset in (0, 4, 8, 9)] == [
        b"one\n",
        b"two\n",
        b"\n",
        b"last",
    ]
    with storage.open_binary(path) as file:
        assert list(file) == [b"one\n", b"two\n", b"\n", b"last"]
    with pytest.raises(OSError, match="more than 2 bytes"):
        storage.read_line(path, 0, max_bytes=2)


def test_folders(root):
    put(f"{root}/frames/b.jpg", b"b")
    put(f"{root}/frames/a.jpg", b"a")
    assert sorted(storage.list_files(f"{root}/frames")) == ["a.jpg", "b.jpg"]
    assert storage.is_folder(f"{root}/frames")
    assert not storage.is_folder(f"{root}/frames/a.jpg")
    assert storage.is_file(f"{root}/frames/a.jpg")
    assert not storage.is_file(f"{root}/frames/c.jpg")


def test_a_missing_file_is_an_oserror_everywhere(root):
    for read in (lambda path: storage.read_line(path, 0), storage.file_facts):
        with pytest.raises(FileNotFoundError):
            read(f"{root}/gone")


def test_facts_change_with_the_file(root):
    put(f"{root}/a", b"one")
    before = storage.file_facts(f"{root}/a")
    put(f"{root}/a", b"other")
    assert before != storage.file_facts(f"{root}/a")


def test_remote_reads_are_bounded(memory):
    put(f"{memory}/a", b"0123456789")
    assert storage.read_whole(f"{memory}/a") == b"0123456789"
    assert storage.read_range(f"{memory}/a", -3, None) == b"789"
    with pytest.raises(OSError, match="more than 4 bytes"):
        storage.read_whole(f"{memory}/a", max_bytes=4)


def test_names_below_an_address():
    assert storage.resolve_path("s3://b/x/", "a/./b.jpg", where="") == "s3://b/x/a/b.jpg"
    assert storage.resolve_path("s3://b/x", "s3://b/x/a.jpg", where="") == "s3://b/x/a.jpg"


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("s3://b/x", "../a.jpg"),
        ("s3://b/x", "/a.jpg"),
        ("s3://b/x", "s3://b/xy/a.jpg"),
        ("s3://b/x", "s3://b/x/../y/a.jpg"),
        ("s3://b/x", "s3://c/a.jpg"),
        ("/data", "s3://b/a.jpg"),
        ("", "s3://b/a.jpg"),
        ("/data", "a\0.jpg"),
    ],
)
def test_names_elsewhere_are_refused(root, name):
    with pytest.raises(DataError, match=r"^here:1: "):
        storage.resolve_path(root, name, where="here:1")


@pytest.mark.parametrize("address", ["s3://key:hunter2@bucket/a", "https://host/a?signature=hunter2"])
def test_addresses_with_credentials_are_refused_without_repeating_them(address):
    with pytest.raises(DataError, match="credentials") as caught:
        storage.check_address(address, where="meta.json: x")
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed here")
def test_a_missing_package_is_named():
    with pytest.raises(
        ConfigError, match=r"s3:// needs a package that is not installed: s3fs .*pip install s3fs"
    ):
        storage.read_line("s3://bucket/a.jsonl", 0)
    with pytest.raises(DataError, match=r"^nowhere://a: .*nowhere"):
        storage.read_line("nowhere://a", 0)


def test_odd_exceptions_of_a_store_become_oserrors(memory, monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def fail(*_args, **_rest):
        raise NoCredentialsError("Unable to locate\ncredentials")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", fail)
    with pytest.raises(OSError, match="NoCredentialsError: Unable to locate credentials"):
        storage.read_whole(f"{memory}/a")
