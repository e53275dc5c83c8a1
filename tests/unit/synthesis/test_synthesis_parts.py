"""Texts, splits, plans, figures and questions, one by one."""

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.media.tiling import TilingRule, choose_grid
from megatron_v2pe.synthesis.document.longvqa import sheet_grid
from megatron_v2pe.synthesis.document.records import Prompted
from megatron_v2pe.synthesis.kinds import KINDS, SampleSpec, parse_kinds, parse_lengths, plan
from megatron_v2pe.synthesis.material.corpus import Corpus, build_corpus, text_files
from megatron_v2pe.synthesis.material.texts import MAX_UNIT_CHARS, paragraphs, read_documents
from megatron_v2pe.synthesis.material.vqa import read_questions
from megatron_v2pe.synthesis.split import names_of, split_of
from megatron_v2pe.synthesis.tasks.glyphs import Glyph, glyphs_of, paste_glyphs
from megatron_v2pe.synthesis.tasks.text_tasks import reasoning
from megatron_v2pe.synthesis.tasks.words import INVENTED
from tests.support.synthesis import config_for


def test_sentences_and_paragraphs():
    assert paragraphs("One is. Two\nis!  \n\n\n Three? yes") == [
        ["One is.", "Two is!"],
        ["Three?", "yes"],
    ]
    assert paragraphs(" \n\n ") == []
    assert paragraphs("\u4e00\u3002\u4e8c\u3002") == [["\u4e00\u3002", "\u4e8c\u3002"]]


def test_long_sentences_are_cut_and_lose_nothing_but_blanks():
    text = "word " * 200 + "x" * 700
    (sentences,) = paragraphs(text)
    assert max(map(len, sentences)) <= MAX_UNIT_CHARS
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "")


def test_documents_of_each_kind_of_file(tmp_path):
    (tmp_path / "a.html").write_text(
        "<html><head><title>no</title></head><p>One &amp; two<script>no()</script><p>three"
    )
    assert paragraphs(next(read_documents(tmp_path / "a.html"))) == [["One & two"], ["three"]]
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["first", "second"]
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n{"body": "second"}\n')
    with pytest.raises(DataError, match=r"b.jsonl:2: text is None"):
        list(read_documents(tmp_path / "b.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=r"not UTF-8 text .* at byte 3"):
        list(read_documents(tmp_path / "a.txt"))


def test_training_leaves_out_sentences_that_evaluation_has(tmp_path):
    shared = "This sentence is quoted in every single one of the files of this folder"
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = f"{shared}. File number {number} continues with words of its own until it ends."
        (tmp_path / "texts" / f"{number}.md").write_text(text)
    summary = build_corpus(text_files(tmp_path / "texts"), store=tmp_path, held_out=0.3, on_file=lambda: None)
    assert summary.num_passages == 40
    said = {}
    for split in ("train", "eval"):
        corpus = Corpus(tmp_path, split)
        said[split] = {
            line for number in corpus.passages for block in corpus.paragraphs(number) for line in block
        }
    assert shared + "." in said["eval"]
    assert said["train"].isdisjoint(said["eval"])
    assert len(said["train"]) + len(said["eval"]) == 40 + 1


def test_a_split_follows_from_the_content_alone():
    splits = [split_of(f"{number:032x}"[::-1], held_out=0.25) for number in range(4000)]
    assert 0.2 < splits.count("eval") / 4000 < 0.3
    assert not set(names_of("train", INVENTED)) & set(names_of("eval", INVENTED))
    assert len(glyphs_of("eval")) >= 20
    assert len(glyphs_of("train")) + len(glyphs_of("eval")) == 80


def test_plans_cover_kinds_lengths_and_depths():
    specs = plan(("text-absent", "image-jigsaw"), (10, 20), count=7, num_depths=3, split="eval", seed=5)
    assert len({spec.sample_id for spec in specs}) == 28
    assert [spec.depth_band for spec in specs[:7]] == [0, 1, 2, 0, 1, 2, 0]
    draws = {spec.generator().integers(2**60) for spec in specs}
    assert len(draws) == 28
    assert specs[3].generator().integers(2**60) == specs[3].generator().integers(2**60)


def test_the_band_of_a_depth():
    spec = SampleSpec(kind="x", split="eval", tokens=1, number=0, depth_band=0, num_depths=5, seed=0)
    assert [spec.band_centre(depth) for depth in (0.0, 0.2, 0.55, 1.0)] == [0.1, 0.3, 0.5, 0.9]


def test_kinds_and_lengths_are_read():
    assert parse_kinds("all") == KINDS
    assert parse_kinds("text-absent, longvqa,text-absent") == (
        "text-absent",
        "longvqa-pages",
        "longvqa-paste",
    )
    assert parse_lengths("300,32K,1m") == (300, 32768, 1048576)
    with pytest.raises(ConfigError, match="'txt' is neither a kind"):
        parse_kinds("txt")
    for bad in ("", "K", "-3", "1.5K", "0"):
        with pytest.raises(ConfigError, match="is not a length"):
            parse_lengths(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count is 0"),
        ({"num_depths": 0}, "--depths is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"num_decoys": 0}, "--decoys is 0"),
        ({"text_per_image": 0}, "--text-per-image is 0"),
        ({"held_out": 1.0}, "--held-out is 1.0"),
        ({"kinds": ("image-jigsaw",), "images": ""}, "--images is missing, but kind image-jigsaw"),
        ({"kinds": ("longvqa-paste",), "vqa": ""}, "--vqa is missing, but kind longvqa-paste"),
        ({"vqa": "a.jsonl"}, "no Long-VQA kind is asked for"),
    ],
)
def test_options_that_cannot_work(inputs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_for(inputs, tmp_path, **{"kinds": ("text-absent",), **changes})


def test_figures_are_drawn_as_often_as_told():
    white = Image.new("RGB", (300, 200), (255, 255, 255))
    glyph = Glyph(color="blue", shape="square")
    for count in (1, 2, 3):
        pasted = paste_glyphs(white, glyph, np.random.default_rng(count), count=count)
        assert pasted.size == white.size
        blue = (np.asarray(pasted) == (30, 80, 220)).all(axis=2)
        assert count_areas(blue) == count
    assert (np.asarray(white) == 255).all()


def count_areas(mask):
    """Connected areas of a mask, by flooding."""
    mask, areas = mask.copy(), 0
    while mask.any():
        areas += 1
        todo = [tuple(np.argwhere(mask)[0])]
        while todo:
            row, column = todo.pop()
            if 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and mask[row, column]:
                mask[row, column] = False
                todo += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return areas


def test_chains_have_one_first_and_one_last():
    for seed in range(30):
        task = reasoning(np.random.default_rng(seed), split="train", depths=[0.1, 0.5, 0.9])
        statements = " ".join(each.text for each in task.insertions)
        if "keeper" in statements:
            assert statements.count(task.answer) == 1
            continue
        names = [word.strip(".") for word in statements.split() if word.strip(".") in INVENTED]
        firsts, seconds = names[::2], names[1::2]
        is_first = any(word in task.question for word in ("first", "deepest"))
        assert task.answer in (set(firsts) - set(seconds) if is_first else set(seconds) - set(firsts))


def test_a_sheet_is_cut_into_its_cells():
    for most in (4, 6, 12, 24):
        rule = TilingRule(image_size=28, max_tiles=most)
        columns, rows = sheet_grid(rule)
        grid = choose_grid(28 * columns, 28 * rows, rule=rule)
        assert (grid.columns, grid.rows) == (columns, rows)
    assert sheet_grid(TilingRule(image_size=28, dynamic=False)) == (2, 2)


def test_prompts_end_as_the_release_ends_them():
    assert Prompted(question="q", answer=1, choices=["x", "y"]).suffix == (
        "\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )
    assert Prompted(question="q", answer=[1, 2]).suffix == ""
    assert Prompted(question="q", answer="x").suffix == "\nAnswer the question using a single word or phrase."
    assert [Prompted(question="q", answer=each).answer_text for each in (1, [1, 2], "x")] == [
        "B",
        "[1, 2]",
        "x",
    ]


def test_short_questions_of_both_forms(tmp_path):
    path = tmp_path / "vqa.jsonl"
    path.write_text(
        '{"image": "a.png", "question": "q", "answer": 3}\n'
        '{"image": ["a.png", "b.png"], "question": "two images", "answer": "x"}\n'
        '{"image": "b.png", "conversations": [{"from": "human", "value": "<image>\\nq1"}, '
        '{"from": "gpt", "value": "a1"}, {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]}\n'
    )
    found = [(each.question, each.answer) for each in read_questions(path, tmp_path)]
    assert found == [("q", "3"), ("q1", "a1"), ("q2", "a2")]
    for line, message in (
        ('{"image": "a.png", "question": "q"}', "vqa.jsonl:1: needs a 'question' and an 'answer'"),
        ('{"image": "../a.png", "question": "q", "answer": "a"}', "lies outside"),
        ('{"image": 3, "question": "q", "answer": "a"}', "image is 3"),
        (
            '{"image": "a.png", "conversations": [{"from": "gpt", "value": "q"}, {"from": "human"}]}',
            "must alternate",
        ),
        ("{", "not valid json"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            list(read_questions(path, tmp_path))
