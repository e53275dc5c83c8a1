"""Documents: exact size, all insertions in, needles at their depth, whatever is asked."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_v2pe.synthesis.document.builder import (
    DocumentBuilder,
    TooShort,
    realised_depths,
    resize,
    size_of,
)
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.document.haystack import Haystack
from megatron_v2pe.synthesis.material.corpus import Corpus, build_corpus, text_files
from megatron_v2pe.synthesis.material.pictures import Picture
from megatron_v2pe.synthesis.tasks.task import Insertion
from tests.support.synthesis import settings_of, write_texts

PICTURE = Picture(name="a.png", size=(112, 112))
FACT = "The chest of Belamora holds a sextant."


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    files = text_files(write_texts(folder / "texts"))
    build_corpus(files, store=folder, held_out=0.3, on_file=lambda: None)
    sample = settings_of()
    counter = TokenCounter(sample)
    return counter, Haystack(Corpus(folder, "train"), counter, sample.text.tokenizer)


INSERTION = st.builds(
    lambda depth, is_image, is_decoy: Insertion(
        depth=depth, text="" if is_image else FACT, pictures=(PICTURE,) if is_image else (), is_decoy=is_decoy
    ),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    insertions=st.lists(INSERTION, max_size=5),
    size=st.integers(20, 3000),
    text_per_image=st.integers(20, 400),
    seed=st.integers(0, 2**20),
    with_images=st.booleans(),
    change=st.integers(-50, 300),
)
def test_size_is_exact_and_a_single_needle_stands_at_its_depth(
    parts, insertions, size, text_per_image, seed, with_images, change
):
    counter, haystack = parts
    stream = haystack.stream(np.random.default_rng(seed), forbidden=("sextant", "Belamora"))
    options = {
        "size": size,
        "stream": stream,
        "next_picture": (lambda: PICTURE) if with_images else None,
        "text_per_image": text_per_image,
        "counter": counter,
    }
    try:
        builder = DocumentBuilder(insertions, **options)
    except TooShort as error:
        is_needed = error.needed > size
        assume(not is_needed)
        raise
    units = builder.build()
    assert size_of(units) == size
    placed = [unit.insertion for unit in units if unit.insertion is not None]
    assert sorted(placed, key=id) == sorted(insertions, key=id)
    assert all("sextant" not in unit.text for unit in units if unit.insertion is None)
    needles = [each for each in insertions if not each.is_decoy]
    if len(needles) == 1:
        (tokens,) = (unit.tokens for unit in units if unit.insertion is needles[0])
        longest = max(
            each.tokens for passage in haystack.passages for each in haystack.sentences(int(passage))
        )
        assert abs(realised_depths(units)[0] - needles[0].depth) * (size - tokens) <= longest
    try:
        assert size_of(resize(units, change, stream=stream, counter=counter)) == size + change
    except TooShort:
        assert change < 0


def test_a_decoy_does_not_push_the_needle_away(parts):
    counter, haystack = parts
    needle = Insertion(depth=0.5, pictures=(PICTURE,))
    decoys = [Insertion(depth=depth, pictures=(PICTURE,), is_decoy=True) for depth in (0.47, 0.48, 0.49)]
    builder = DocumentBuilder(
        [needle, *decoys],
        size=400,
        stream=haystack.stream(np.random.default_rng(0), forbidden=()),
        next_picture=lambda: PICTURE,
        text_per_image=50,
        counter=counter,
    )
    (depth,) = realised_depths(builder.build())
    assert abs(depth - 0.5) < 0.06
