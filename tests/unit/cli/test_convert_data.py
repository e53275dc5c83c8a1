"""convert-data: every container and format to one record a line; bad records are named and not written."""

import base64
import gzip
import io
import json

import pytest
from PIL import Image

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.sources.containers import records_of
from megatron_v2pe.data.sources.file_kinds import annotation_kind, kind_of, way_out
from tests.support.mixture import empty_mixture, entry, record

RECORDS = [
    record("a", "b"),
    {"messages": [{"role": "user", "content": "\u00e9"}, {"role": "assistant", "content": "x"}]},
]


def run(capsys, *arguments):
    code = main(["convert-data", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out + output.err


CONTAINERS = {
    "a.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
    "a.jsonl": "".join(json.dumps(each) + "\n" for each in RECORDS).encode(),
    "objects.json": "\n".join(json.dumps(each, indent=1) for each in RECORDS).encode(),
    "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "a.jsonl.gz": gzip.compress("".join(json.dumps(each) + "\n" for each in RECORDS).encode()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(CONTAINERS[name])
    out = tmp_path / "out.jsonl"
    code, text = run(capsys, tmp_path / name, "--out", out)
    assert code == 0
    assert "2 records, 0 bad" in text
    assert "records of the form role/content are recognised" in text
    assert [json.loads(line) for line in out.read_text().splitlines()] == RECORDS
    assert run(capsys, out, "--check")[0] == 0


def test_records_larger_than_a_block(tmp_path):
    values = [record("a" * 3_000_000, "b"), *RECORDS]
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert [value for _, value in records_of(str(tmp_path / "a.json"))] == values


def test_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    values = [{"image": {"bytes": buffer.getvalue(), "path": None}, **record("<image> a", "b")}]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    code, text = run(
        capsys, tmp_path / "a.parquet", "--out", tmp_path / "o.jsonl", "--media", tmp_path / "media"
    )
    assert (code, "1 media files" in text) == (0, True)
    (line,) = (tmp_path / "o.jsonl").read_text().splitlines()
    assert (tmp_path / "media" / json.loads(line)["image"]).read_bytes() == buffer.getvalue()


def test_images_as_base64_become_files(tmp_path, capsys):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "a.jsonl").write_text(json.dumps({**record("<image> a", "b"), "image": address}) + "\n")
    code, text = run(capsys, tmp_path / "a.jsonl", "--check")
    assert code == 2
    assert "--media FOLDER" in text
    assert len(text) < 1500
    code, text = run(
        capsys, tmp_path / "a.jsonl", "--out", tmp_path / "o.jsonl", "--media", tmp_path / "media"
    )
    (name,) = [json.loads(line)["image"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert (tmp_path / "media" / name).read_bytes() == buffer.getvalue()
    assert name.endswith(".png")


def test_bad_records_are_named_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(RECORDS[0]) + "\n" + json.dumps({"imgs": "x", **RECORDS[0]}) + "\n[]\n"
    )
    code, text = run(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "o.jsonl")
    assert code == 2
    assert "a.jsonl:2: unknown key 'imgs'; is 'image' meant" in text
    assert not (tmp_path / "o.jsonl").exists()
    code, text = run(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "o.jsonl", "--skip-bad")
    assert (code, len((tmp_path / "o.jsonl").read_text().splitlines())) == (0, 1)
    assert run(capsys, tmp_path / "a.jsonl")[0] == 2


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        (gzip.compress(b"{}", mtime=0), "a gzip file"),
        (b"PAR1....", "a parquet file"),
        (b"PK\x03\x04", "a zip archive"),
        (b'[{"a": 1}]', "one json array"),
        (b'{\n "a": 1\n}', "json over several lines"),
        (b"image,question,answer\na.png,b,c\n", "a CSV table"),
    ],
    ids=["lfs", "html", "utf16", "utf16-le", "gzip", "parquet", "zip", "array", "lines", "csv"],
)  # fmt: skip
def test_one_line_says_what_an_annotation_file_is(tmp_path, content, kind):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"a.jsonl: is {kind}.*convert-data") as caught:
        index_dataset(
            entry(annotation=str(tmp_path / "a.jsonl")),
            settings=empty_mixture(tmp_path).settings(),
            cache_dir=tmp_path / "cache",
        )
    assert str(caught.value).count("\n") == 0


def test_records_are_of_no_other_kind():
    for values in RECORDS:
        assert annotation_kind(json.dumps(values).encode()) == ""
    assert kind_of(b"{}") == ""
    assert annotation_kind(b'\xef\xbb\xbf{"a": 1}\n') == ""


def test_only_what_can_be_converted_is_sent_to_convert_data():
    assert annotation_kind(b'"{\\"conversations\\": []}"\n') == "json objects written as texts"
    assert "convert-data" in way_out(annotation_kind(b"[{}]"))
    for head in (b"image,question\n", b"<html>", "x".encode("utf-16"), b'"{}"\n'):
        assert "convert-data" not in way_out(annotation_kind(head))
