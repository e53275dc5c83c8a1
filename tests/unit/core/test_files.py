"""core.files: old state or new state, never something between."""

import errno
import os

import pytest

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import commit_folder, explained_full_disk, writable_folder, write_atomic


def test_write_and_replace(tmp_path):
    target = tmp_path / "a.json"
    write_atomic(target, "caf\u00e9")
    assert target.read_bytes() == "caf\u00e9".encode()
    write_atomic(target, b"\x00\x01")
    assert target.read_bytes() == b"\x00\x01"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomic(target, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_commit_folder_renames_with_contents(tmp_path):
    (tmp_path / "x.tmp" / "sub").mkdir(parents=True)
    (tmp_path / "x.tmp" / "sub" / "f").write_text("data")
    commit_folder(tmp_path / "x.tmp", tmp_path / "x")
    assert (tmp_path / "x" / "sub" / "f").read_text() == "data"
    assert not (tmp_path / "x.tmp").exists()


def test_commit_folder_refuses_to_replace(tmp_path):
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x").mkdir()
    with pytest.raises(FileExistsError):
        commit_folder(tmp_path / "x.tmp", tmp_path / "x")
    assert (tmp_path / "x.tmp").exists()


def test_commit_folder_flushes_every_file_before_the_rename(tmp_path, monkeypatch):
    (tmp_path / "x.tmp" / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (tmp_path / "x.tmp" / name).write_text(name)
    events = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), real_rename(a, b)))
    commit_folder(tmp_path / "x.tmp", tmp_path / "x")
    before = [event.removeprefix(str(tmp_path)) for event in events[: events.index("rename")]]
    assert {"/x.tmp/a", "/x.tmp/sub/b"} <= set(before)
    assert events[-1] == str(tmp_path)  # the parent, so that the new name survives


def test_writable_folder_creates(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b", field="runtime.run_dir")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_writable_folder_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"runtime\.run_dir is '.*cannot be written"):
            writable_folder(path, field="runtime.run_dir")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_a_mistake_that_a_later_start_may_not_meet(tmp_path, code):
    words = r"metrics.jsonl: cannot be written \(.*GiB free.*continues from the newest checkpoint"
    with pytest.raises(ConfigError, match=words) as caught, explained_full_disk(tmp_path):
        raise OSError(code, os.strerror(code), "metrics.jsonl")
    assert not caught.value.is_final


def test_other_errors_of_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), explained_full_disk(tmp_path):
        (tmp_path / "none").read_text()
