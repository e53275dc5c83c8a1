"""What is drawn from, on rows small enough to do by hand; draws depend on seed and number alone."""

import math

import pytest
import torch

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.sampling import Sampling, adjusted, draw, warped


def probabilities(logits, **how):
    return (
        warped(torch.tensor(logits), Sampling(temperature=how.pop("temperature", 1.0), **how))
        .softmax(-1)
        .tolist()
    )


ROW = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),  # 0.5 is less than 0.79, 0.5 + 0.3 is enough
        ({"top_p": 0.2}, [1, 0, 0, 0]),  # the most probable one always stays
        ({"min_p": 0.4}, [0.625, 0.375, 0, 0]),  # at least 0.4 * 0.5
        ({"temperature": 0.5}, [p / 0.365 for p in (0.25, 0.09, 0.0225, 0.0025)]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),  # 0.5 + 0.3 of 0.95 is 0.84
    ],
)
def test_cuts(how, wanted):
    assert probabilities(ROW, **how) == pytest.approx(wanted, abs=1e-6)


def test_penalty_and_minimum_length_on_a_part_of_the_vocabulary():
    logits = torch.tensor([2.0, -2.0, 1.0])
    sampling = Sampling(repetition_penalty=2.0, min_new_tokens=3)
    found = adjusted(logits, sampling=sampling, generated=[10, 11], stop_ids=[12, 99], first_index=10)
    assert found.tolist() == [1.0, -4.0, float("-inf")]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    longer = adjusted(logits, sampling=sampling, generated=[10, 10, 10], stop_ids=[12], first_index=10)
    assert longer.tolist() == [1.0, -2.0, 1.0]
    assert adjusted(logits, sampling=Sampling(), generated=[10], stop_ids=[12], first_index=10) is logits


def test_draws_repeat_and_follow_the_probabilities():
    row = torch.tensor(ROW)
    sampling = Sampling(temperature=1.0, seed=5)
    drawn = [draw(row, sampling=sampling, number=number) for number in range(2000)]
    assert drawn == [draw(row, sampling=sampling, number=number) for number in range(2000)]
    other = [draw(row, sampling=Sampling(temperature=1.0, seed=6), number=number) for number in range(2000)]
    assert other != drawn
    for token, wanted in enumerate((0.5, 0.3, 0.15, 0.05)):
        # Four standard deviations of a share of 2000 draws.
        assert drawn.count(token) / 2000 == pytest.approx(
            wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 2000)
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0, but must be at least 1"),
        ({"min_new_tokens": 300}, "--min-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"temperature": 1.0, "min_p": 1.0}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"stop": ("",)}, "--stop"),
        ({"num_answers": 2}, "--num-answers"),
        ({"num_beams": 2, "temperature": 1.0}, "--num-beams"),
        ({"top_k": 5}, "--top-k"),
    ],
)
def test_bad_values_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**how)
