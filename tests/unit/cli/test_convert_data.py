"""convert-data: every container and format to one record a line; bad records are named and not written."""

import base64
import datetime
import decimal
import gzip
import io
import json

import pytest
from PIL import Image

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.samples.records import parse_line
from megatron_v2pe.data.sources import containers
from megatron_v2pe.data.sources.containers import records_of
from megatron_v2pe.data.sources.file_kinds import annotation_kind, kind_of, way_out
from megatron_v2pe.data.sources.meta import read_meta
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


@pytest.mark.parametrize("kind", ["part", "part_url", "plain_url", "base64", "bytes", "list"])
def test_images_become_files_wherever_a_record_holds_them(tmp_path, capsys, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    address = f"data:image/png;base64,{text}"
    parts = {
        "part": {"type": "image", "image": address},
        "part_url": {"type": "image_url", "image_url": {"url": address, "detail": "low"}},
        "plain_url": {"type": "image_url", "image_url": address},
    }
    images = {"base64": text, "bytes": {"bytes": text, "path": None}, "list": [{"bytes": text}]}
    if kind in parts:
        content = [parts[kind], {"type": "text", "text": "What?"}]
        value = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}
    else:
        value = {"image": images[kind], **record("<image> a", "b")}
    (tmp_path / "a.jsonl").write_text(json.dumps(value) + "\n")
    code, output = run(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "o.jsonl", "--media", tmp_path / "m")
    assert (code, "1 records, 0 bad, 1 media files" in output) == (0, True), output
    (file,) = (tmp_path / "m").iterdir()
    assert file.read_bytes() == buffer.getvalue()
    (line,) = (tmp_path / "o.jsonl").read_text().splitlines()
    assert file.name in line
    assert text not in line
    parsed = parse_line(
        line.encode(), entry=entry(annotation="o.jsonl", root=str(tmp_path / "m")), line_number=1
    )
    assert [medium.path for medium in parsed.media] == [str(file)]


def test_times_and_exact_numbers_of_parquet_are_no_reason_to_refuse_a_record(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = [
        {"at": datetime.datetime(2024, 1, 2), "price": decimal.Decimal("1.5"), **record("a", "b")},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    code, text = run(capsys, tmp_path / "a.parquet", "--out", tmp_path / "o.jsonl")
    assert code == 0, text
    found = json.loads((tmp_path / "o.jsonl").read_text())
    assert (found["at"], found["price"]) == ("2024-01-02T00:00:00", 1.5)
    parquet.write_table(
        pyarrow.Table.from_pylist([{"thumb": b"abc", **record("a", "b")}]), tmp_path / "b.parquet"
    )
    code, text = run(capsys, tmp_path / "b.parquet", "--check")
    assert code == 2
    assert "b.parquet:1: key 'thumb' cannot be written as json (it holds bytes); remove it" in text


def test_parquet_within_gzip_is_bounded(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([record("a", "b")]), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert [value for _, value in records_of(str(path))] == [record("a", "b")]
    monkeypatch.setattr(containers, "_MOST_PARQUET_BYTES", 100)
    with pytest.raises(DataError, match="more than 100 bytes within gzip; unpack it first"):
        list(records_of(str(path)))


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
    with pytest.raises(DataError, match=rf"a\.jsonl: is {kind}.*(convert-data|docs/data\.md)") as caught:
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
    for head in (b"[{}]", b"image,question\n", b"image;question\n"):
        assert "convert-data" in way_out(annotation_kind(head))
    for head in (b"<html>", "x".encode("utf-16"), b'"{}"\n'):
        assert "convert-data" not in way_out(annotation_kind(head))


def human_gpt(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


TABLES = {
    "comma.csv": 'image,question,answer\na.png,What?,a cat\n,Why?,"so, ""it""\nis"\n',
    "excel.csv": '\ufeffFile_Name;Question;Label\r\na.png;What?;a cat\r\n;Why?;"so, ""it""\nis"\r\n',
    "tabs.tsv": 'img\tprompt\tcaption\na.png\tWhat?\ta cat\n\n\tWhy?\t"so, ""it""\nis"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, capsys, name):
    (tmp_path / name).write_text(TABLES[name], newline="")
    code, text = run(capsys, tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert code == 0, text
    assert "2 records, 0 bad" in text
    assert "columns: " in text
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"image": "a.png", "conversations": human_gpt("What?", "a cat")},
        {"conversations": human_gpt("Why?", 'so, "it"\nis')},
    ]


def test_columns_of_other_names_lists_and_what_is_not_read(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('pics,frage,answer,label,source\n"[""a.png"", ""b.png""]",q?,x,y,web\n')
    code, text = run(capsys, tmp_path / "a.csv", "--check", "--columns", "image=pics,question=frage")
    assert code == 2
    assert "'answer' and 'label' may both be the answer; choose one with --columns answer=answer" in text
    columns = "image=pics,question=frage,answer=label"
    code, text = run(capsys, tmp_path / "a.csv", "--out", tmp_path / "out.jsonl", "--columns", columns)
    assert code == 0, text
    assert "key 'source' is not read" in text
    assert "key 'answer' is not read" in text
    wanted = {"image": ["a.png", "b.png"], "conversations": human_gpt("<image>\n<image>\nq?", "y")}
    assert json.loads((tmp_path / "out.jsonl").read_text()) == wanted


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a,b\n1,2\n3,4\n", (), "a.csv:2: no column is recognised as the question; columns are 'a', 'b'"),
        ("question,answer\nx\n", (), "a.csv:2: has 1 cells, but the header 2"),
        ("question,answer,answer\nx,y,z\n", (), "a.csv:1: the first line names 'answer' twice"),
        ("question,,answer\nx,y,z\n", (), "a.csv:1: the first line has a column without a name"),
        ('question,answer\nx,"y" z\n', (), "a.csv:2: not a sound table"),
        ("question,answer\nx,\n", (), "a.csv:2: answer (column 'answer') is empty"),
        (
            "question,answer,image_paht\nx,y,a.png\n",
            (),
            "a.csv:2: column 'image_paht' would not be read ('a.png')",
        ),
        ("question,answer,bild\nx,y,a.PNG\n", (), "name it with --columns image=bild"),
        ("question,answer,sytem\nx,y,z\n", (), "name it with --columns system=sytem"),
        ("question,answer\nx,y\n", ("--columns", "question=quest"), "is 'question' meant?"),
        ("question,answer\nx,y\n", ("--columns", "frage=q"), "--columns: 'frage=q' is not MEANING=COLUMN"),
        ("question,answer\n", (), "no record in it"),
    ],
)
def test_tables_that_cannot_be_read_are_named_once(tmp_path, capsys, content, arguments, message):
    (tmp_path / "a.csv").write_text(content)
    code, text = run(capsys, tmp_path / "a.csv", "--check", *arguments)
    assert code == 2
    assert text.count(message) == 1, text


def test_flat_rows_of_other_containers_are_read_alike(tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"question": "q", "answer": 7, "image": "a.png", "video": null}]')
    assert run(capsys, tmp_path / "a.json", "--out", tmp_path / "out.jsonl")[0] == 0
    wanted = {"image": "a.png", "conversations": human_gpt("q", "7")}
    assert json.loads((tmp_path / "out.jsonl").read_text()) == wanted
    code, text = run(capsys, tmp_path / "out.jsonl", "--check", "--columns", "question=q")
    assert code == 2
    assert "has a conversation of its own; leave out --columns" in text


def test_the_meta_json_names_the_file_and_its_pictures(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("image,question,answer\na.png,q,a\n")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    out, meta = tmp_path / "train.jsonl", tmp_path / "data.json"
    more = ("--out", out, "--meta", meta, "--root", tmp_path / "photos")
    assert run(capsys, tmp_path / "a.csv", *more)[0] == 0
    (read,) = read_meta(meta)
    assert (read.name, read.annotation) == ("train", str(out))
    assert (tmp_path / "photos").samefile(read.root)
    assert "is there already" in run(capsys, tmp_path / "a.csv", *more)[1]
    assert "no folder" in run(capsys, tmp_path / "a.csv", "--out", out, "--meta", "m", "--root", "none")[1]
