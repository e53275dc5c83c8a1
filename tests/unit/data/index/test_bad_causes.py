"""Bad lines by cause: a reason is said once, with the places of all that share it."""

from megatron_v2pe.cli.main import main
from megatron_v2pe.data.index.bad_causes import by_cause, cause_lines, place_of
from megatron_v2pe.data.index.rows import BadSample
from tests.support.mixture import HF_FOLDER, record


def bad(number, text, annotation="data/a.jsonl", kind="broken"):
    return BadSample(
        sample_id=f"a:{number}", line_number=number, message=f"{annotation}:{number}{text}", kind=kind
    )


def test_names_and_numbers_do_not_make_another_cause():
    samples = [
        bad(1, ": ./img/1.png: no such image; check the root"),
        bad(2, ": conversations[1].from is 'x', but must be 'human'"),
        bad(3, ": ./img/22.jpeg: no such image; check the root"),
        bad(4, ": conversations[3].from is 'bot2', but must be 'human'"),
        bad(5, ": 1,024 tokens exceed 512", kind="long"),
        bad(6, ": s3://b:6/x.png: no such image; check the root"),
    ]
    assert [[each.line_number for each in group] for group in by_cause(samples)] == [[1, 3, 6], [2, 4], [5]]
    assert cause_lines(samples)[:2] == [
        samples[0].message,
        "  and 2 more of this kind: data/a.jsonl:3, data/a.jsonl:6",
    ]


def test_a_place_is_the_annotation_and_its_line():
    assert place_of(bad(5, ": x", annotation="s3://b:500/a.jsonl")) == "s3://b:500/a.jsonl:5"


def test_long_lists_are_cut():
    words = ["".join(chr(97 + (n // 26**i) % 26) for i in range(3)) for n in range(30)]
    lines = cause_lines([bad(n + 1, f": {word}") for n, word in enumerate(words)])
    assert lines[-1] == "and 10 for 10 other reasons"


def test_index_data_says_each_cause_once(mixture, capsys):
    lines = [record("a", "b"), *(record("<image>", "x", f"no_{n}.png") for n in range(30)), "{", "["]
    mixture.write(lines)
    meta, cache = str(mixture.folder / "meta.json"), str(mixture.folder / "cache")
    code = main(["index-data", "--meta", meta, "--checkpoint", str(HF_FOLDER), "--cache-dir", cache])
    found = capsys.readouterr()
    assert code == 2
    assert found.err.count("no such image") == 1
    assert "and 29 more of this kind" in found.err
    assert "32 of 33 samples are bad" in found.err
