"""Every metric by hand: empty, punctuation, case, units, numbers, `(B)`, surplus items."""

import pytest

from megatron_v2pe.evaluation.metrics import denotation, letters, open_answers, overlap, rectify, vqa_text
from megatron_v2pe.evaluation.metrics.needle import needle_score

# answer, response, release, original, clean
NEEDLES = [
    (1, "B", 1, 1, 1),
    (1, "b.", 1, 1, 1),
    (1, "B. banana", 1, 1, 1),
    (1, "The answer is B", 1, 1, 1),
    (1, "**B**", 1, 1, 1),
    (1, "1", 1, 1, 1),
    (1, "(B)", 0, 0, 0),
    (0, "The camera is moving left", 1, 1, 1),
    (0, "left", 1, 0, 1),
    (1, "right.", 1, 0, 1),
    (0, "none", 0, 0, 0),
    (0, "", 0, 0, 0),
    ([1, 2, 3], "[1, 2, 3]", 1, 1, 1),
    ([1, 2, 3], "[1,2]", 2 / 3, 2 / 3, 0),
    ([1, 2, 3], "[1,2,3,4]", 1, 1, 0),
    ([1, 2, 3], "```json\n[1,3,3]\n```", 2 / 3, 2 / 3, 2 / 3),
    ([1, 2, 3], '{"little_penguin":[1,2,3]}', 1, 1, 1),
    ([1, 2, 3], "1,2,3", 0, 0, 0),
    ([1, 2, 3], "The counts are [1,2,3]", 0, 0, 0),
    ([1], '{"a": 1}', 0, 0, 0),
    ([1], "", 0, 0, 0),
    ("banana", "It is a banana.", 1, 1, 1),
    ("banana", "bananas", 0, 0, 0),
    ("Region C", "region c", 1, 1, 1),
    ("two", "2", 1, 1, 1),
    ("no", "none", 0, 0, 0),
    ("A", "The a", 0, 0, 0),
    ("A", "a", 1, 0, 1),
    ("banana", "", 0, 0, 0),
]


@pytest.mark.parametrize(("answer", "response", "release", "original", "clean"), NEEDLES)
def test_needles(answer, response, release, original, clean):
    values = [needle_score(answer, response, mode=mode) for mode in ("release", "original", "clean")]
    assert values == pytest.approx([release, original, clean])


def test_at_most_32_periods_are_taken_out():
    assert vqa_text.strip_punctuation(". " * 40).count(".") == 40 - 32


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("1,000 km", "1000 km"),
        ("a-b", "b"),
        ("none", "0"),
        ("it's", "it 's"),
        ("yall'd've couldnt've", "y'all'd've couldn't've"),
        ("", ""),
    ],
)
def test_the_vqa_normaliser(text, normal):
    assert vqa_text.vqa_normal(text) == normal


def test_soft_accuracy_counts_three_agreeing_people_as_right():
    people = ["cat"] * 3 + ["dog"] * 7
    assert vqa_text.vqa_soft_accuracy("Cat.", people) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa_text.vqa_soft_accuracy("bird", people) == 0
    assert vqa_text.vqa_soft_accuracy("the dog", ["dog"]) == 1


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("10.5", "10", 1),
        ("10.6", "10", 0),
        ("-9.5", "-10", 1),
        ("50%", "0.5", 1),
        ("Yes", "yes", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("ten", "10", 0),
        ("", "10", 0),
        ("3 km", "3", 0),
    ],
)
def test_relaxed_accuracy(said, wanted, value):
    assert overlap.relaxed_correctness(said, wanted) == value


def test_relaxed_accuracy_of_a_zero_said_differs_in_long_vqa():
    assert overlap.relaxed_correctness("0", "0.0") == 0
    assert overlap.relaxed_correctness_owl("0", "0") == 1
    assert overlap.relaxed_correctness_owl("0", "10") == 0


@pytest.mark.parametrize(
    ("said", "answers", "official", "owl"),
    [
        ("ac", ["ab"], 0.5, 0),
        ("a b", ["a  b"], 1, 0.75),
        ("", [""], 1, 1),
        ("", ["abc"], 0, 0),
        ("HELLO", ["hello", "x"], 1, 1),
        ("helo", ["hello"], 0.8, 0.8),
    ],
)
def test_anls(said, answers, official, owl):
    assert overlap.anls(said, answers) == pytest.approx(official)
    assert overlap.anls(said, answers, rule="owl") == pytest.approx(owl)


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.8),
        ("a b c d", "d c b a", 0.25),
        ("Running fast.", "running fast", 0.5),
        ("the the the cat", "the cat", 1.0),
        ("", "the cat", 0),
        (". .", "the cat", 0),
    ],
)
def test_rouge_l_is_that_of_the_package_rouge(said, wanted, value):
    assert overlap.rouge_l(said, wanted) == pytest.approx(value, abs=1e-4)


def test_bleu_is_of_the_corpus():
    same = "a red square on the wall"
    assert overlap.bleu4([same], [[same]]) == pytest.approx(1)
    assert overlap.bleu4([same, ""], [[same], ["two blue circles near the door"]]) < 0.5
    assert overlap.bleu4([""], [[same]]) == 0


@pytest.mark.parametrize(
    ("text", "choices", "release", "single", "fork"),
    [
        ("b", ["x1", "x2"], "B", "B", "B"),
        ("b took it", ["left", "took it"], "B", "B", "B"),
        ("he took it", ["left", "took it"], "B", "B", "B"),
        ("", ["x1", "x2"], "C", "C", "C"),
        ("cars", ["left", "right", "up", "down"], "CA", "CA", "C"),
        ("it is b", ["x1", "x2"], "B", "B", "B"),
        ("the answer is b", ["x1", "x2", "x3"], "AB", "B", "AB"),
        ("0 02", ["0.02", "0.2"], "", "", ""),
        ("0.02", ["0.02", "0.2"], "", "", ""),
    ],
)
def test_milebench_letters(text, choices, release, single, fork):
    found = [letters.milebench_choice(text, choices, rule=rule) for rule in letters.LETTER_RULES]
    assert found == [release, single, fork]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(B) banana", "B"),
        ("**B**", "B"),
        ("The answer is (b).", "B"),
        ("Answer: B", "B"),
        ("A dog", ""),
        ("I think so", ""),
        ("Banana", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_clean_letters(text, letter):
    assert letters.clean_choice(text, "ABCD") == letter


def test_other_letter_rules():
    options = {"A": "cat", "B": "dog"}
    assert [letters.internvl_choice(t, options) for t in ("B", "B. dog", "it is a dog", "", "x")] == [
        "B",
        "B",
        "B",
        "",
        "x",
    ]
    assert letters.mvbench_is_correct("(B) dog", "(B) dog")
    assert letters.mvbench_is_correct("b.", "(B) dog")
    assert letters.mvbench_is_correct("", "(B) dog"), "as published; mode clean does not count it"
    assert not letters.mvbench_is_correct("(A) cat", "(B) dog")
    assert [letters.videomme_choice(t) for t in ("The best answer is: C", "D. x", "", "no idea")] == [
        "C",
        "D",
        "",
        "",
    ]
    assert [letters.letter_of(n) for n in (0, 25, 26, 27)] == ["A", "Z", "AA", "AB"]


@pytest.mark.parametrize(
    ("said", "answers", "value"),
    [
        ("2,001", ["2001"], 0),
        ("2001.0", ["2001"], 1),
        ("Caf\u00e9 (Paris)", ["cafe"], 1),
        ("2001-xx-xx", ["2001"], 1),
        ("2001-05-06", ["2001-5-6"], 1),
        ('"quoted"', ["quoted"], 1),
        ("x", ["x", "y"], 0),
        ("", ["x"], 0),
    ],
)
def test_denotations(said, answers, value):
    assert denotation.wtq_match(said, answers) == value


def test_due_f1_is_the_share_of_matches():
    pairs = [("1", "ACME.", ["acme"]), ("2", "x", ["y"]), ("3", "", ["z"]), ("4", "b", ["a", "b"])]
    assert denotation.due_f1(pairs) == 0.5
    assert denotation.due_f1([]) == 0


@pytest.mark.parametrize(
    ("task", "text", "out"),
    [
        ("chartqa", "Yes, it is", "yes"),
        ("chartqa", "two", "2"),
        ("chartqa", "1,200 km", "1200"),
        ("chartqa", "45%", "45"),
        ("chartqa", "[12]", "12"),
        ("chartqa", "3/4", "0.75"),
        ("chartqa", "3/0", "3/0"),
        ("svqa", "B. dog", "B"),
        ("tabfact", "no way", "No"),
        ("docvqa", "1,200 km.", "1,200 km"),
        ("chartqa", "", ""),
    ],
)
def test_rectify(task, text, out):
    assert rectify.rectify(task, text) == out


def test_rectify_with_word_lists():
    lexicon = rectify.Lexicon(
        words=frozenset(["run", "make", "walk"]), singular=lambda word: word.removesuffix("s")
    )
    out = rectify.rectify("chartqa", "Dogs running making walking thing", lexicon=lexicon)
    assert out == "dog run make walk thing"


def test_open_answers_of_mmmu():
    assert open_answers.mmmu_readings("The answer is 1,200 m.") == ["1,200 m", 1200.0, 200.0]
    assert open_answers.mmmu_open_is_correct("so x = 3.14159", ["3.14"])
    assert open_answers.mmmu_open_is_correct("it is the red key", ["red"])
    assert not open_answers.mmmu_open_is_correct("", ["red"])


def test_yes_and_no_of_pope():
    assert [open_answers.pope_says_yes(t) for t in ("Yes", "No, it", "there is not. yes", "", "nothing")] == [
        True,
        False,
        False,
        True,
        True,
    ]
