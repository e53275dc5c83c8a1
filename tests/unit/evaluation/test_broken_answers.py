"""No metric fails, or takes long, for what a broken model may answer: digits without end, a repeated word."""

import time

import pytest

from megatron_v2pe.evaluation.metrics import (
    denotation,
    letters,
    long_documents,
    needle,
    open_answers,
    overlap,
    rectify,
    vqa_text,
)

ANSWERS = {
    "digits": "1" * 4400,
    "label of digits": "label: " + "9" * 5000,
    "list of digits": "[1," + "9" * 5000 + "]",
    "brackets": "[" * 3000 + "]",
    "braces": "{" * 2000,
    "parentheses": "(" * 5000,
    "asterisks": "*" * 5000,
    "a letter": "a" * 5000,
    "a word": "the " * 2000,
    "boxes": "\\boxed{" * 500,
    "object in object": '{"a":{"b":[]}}',
    "nothing": "",
    "blank": " ",
    "division": "1/0",
    "not a number": "nan",
    "infinite": "1e400%",
    "square": "\u00b2",
    "circled": "\u2460",
    "Arabic digit": "\u0663",
    "half a pair": "\ud800",
}
METRICS = {
    "clean_choice": lambda said: letters.clean_choice(said, ["A", "B"]),
    "internvl_choice": lambda said: letters.internvl_choice(said, {"A": "x", "B": "y"}),
    "milebench_text": letters.milebench_text,
    "mvbench": lambda said: letters.mvbench_is_correct(said, "A"),
    "videomme": letters.videomme_choice,
    "class_number": lambda said: long_documents.class_number(said, 3),
    "contains": lambda said: long_documents.contains(said, "x"),
    "integer": lambda said: long_documents.document_answer(said, "5", "Integer"),
    "float": lambda said: long_documents.document_answer(said, "5.5", "Float"),
    "string": lambda said: long_documents.document_answer(said, "abc", "String"),
    "list": lambda said: long_documents.document_answer(said, '["a", "1"]', "List"),
    "letter": lambda said: long_documents.letter(said, 1),
    "same_sum": lambda said: long_documents.same_sum(said, [1, 2]),
    "yes_or_no": lambda said: long_documents.yes_or_no(said, "yes"),
    "needle option": lambda said: needle.needle_score(1, said, mode="clean"),
    "needle list": lambda said: needle.needle_score([1, 2], said, mode="original"),
    "needle text": lambda said: needle.needle_score("abc", said, mode="clean"),
    "mmmu": lambda said: open_answers.mmmu_open_is_correct(said, ["1", "abc"]),
    "pope": open_answers.pope_says_yes,
    "anls": lambda said: overlap.anls(said, ["abc"]),
    "relaxed": lambda said: overlap.relaxed_correctness(said, "5"),
    "rouge_l": lambda said: overlap.rouge_l(said, "a b c"),
    "rectify": lambda said: rectify.rectify("textneedleinahaystack", said),
    "has_word": lambda said: vqa_text.has_word(said, "a"),
    "vqa": lambda said: vqa_text.vqa_soft_accuracy(said, ["a"] * 10),
    "due": denotation.due_text,
    "wtq": lambda said: denotation.wtq_match(said, ["1", "2020-01-02"]),
}


@pytest.mark.parametrize("name", METRICS)
def test_any_answer_is_scored(name):
    for what, said in ANSWERS.items():
        started = time.process_time()
        METRICS[name](said)
        assert time.process_time() - started < 5, what  # seconds of CPU; milliseconds are usual


def test_the_last_letter_and_the_last_number_count():
    assert long_documents.letter("A or B, so B", 1) == 1.0
    assert long_documents.letter("B, not A", 1) == 0.0
    assert long_documents.class_number("12 and 3", 3) == 1.0
    assert long_documents.class_number("3 and 12", 3) == 0.0
    assert long_documents.class_number("label: 3, not 4", 3) == 1.0
    assert long_documents.class_number("a3b", 3) == 0.0


def test_a_repeated_word_has_a_rouge_score():
    """The package counts each word once: 3 of 4 are the reference's, all 3 of it are there; F = 6/7."""
    assert overlap.rouge_l("a b c " + "d " * 2000, "a b c") == pytest.approx(6 / 7, abs=1e-6)
