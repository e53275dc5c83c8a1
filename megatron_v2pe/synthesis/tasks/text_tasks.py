"""Needles of text: a fact, counts, statements to join, and decoys of the same form.

retrieval  "The chest of Belamora holds a sextant."        "What does the chest of Belamora hold?"   sextant
counting   "The sleepy heron counted 7 kites." (1 to 3)    "... each time?"                          [7, 2]
reasoning  three statements on an order, or on what is left
decoys     one fact that is asked for among facts with other keys
absent     only facts with other keys                      none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.synthesis.split import Split, names_of
from megatron_v2pe.synthesis.tasks import words
from megatron_v2pe.synthesis.tasks.task import Insertion, Task

_OR_NONE = " If the text does not say, answer none."


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A statement on a key, the question that it answers, and the answer."""

    key: str
    statement: str
    question: str
    answer: str


def _thing(key: str, random: np.random.Generator) -> Fact:
    value = str(random.choice(words.THINGS))
    return Fact(
        key=key,
        statement=f"The chest of {key} holds {words.article(value)}.",
        question=f"What does the chest of {key} hold?",
        answer=value,
    )


def _code(key: str, random: np.random.Generator) -> Fact:
    value = str(random.integers(1000, 10000))
    return Fact(
        key=key,
        statement=f"The gate code of {key} is {value}.",
        question=f"What is the gate code of {key}?",
        answer=value,
    )


def _color(key: str, random: np.random.Generator) -> Fact:
    value = str(random.choice(words.COLORS))
    return Fact(
        key=key,
        statement=f"The signal flag of {key} is {value}.",
        question=f"What colour is the signal flag of {key}?",
        answer=value,
    )


_FACTS: tuple[Callable[[str, np.random.Generator], Fact], ...] = (_thing, _code, _color)


def _keys(split: Split, random: np.random.Generator, count: int) -> list[str]:
    return [str(name) for name in random.choice(names_of(split, words.INVENTED), count, replace=False)]


def retrieval(random: np.random.Generator, *, split: Split, depth: float) -> Task:
    """One fact."""
    (key,) = _keys(split, random, 1)
    fact = _FACTS[random.integers(len(_FACTS))](key, random)
    return Task(
        insertions=(Insertion(depth=depth, text=fact.statement),),
        question=fact.question,
        answer=fact.answer,
        forbidden=(fact.key, fact.answer),
    )


def decoys(
    random: np.random.Generator, *, split: Split, depth: float, num_decoys: int, has_answer: bool
) -> Task:
    """Facts of one form with different keys and values; asked for one of them, or for one that is not there."""
    make = _FACTS[random.integers(len(_FACTS))]
    facts: list[Fact] = []
    for key in _keys(split, random, num_decoys + 1):
        fact = make(key, random)
        while fact.answer in [other.answer for other in facts]:
            fact = make(key, random)
        facts.append(fact)
    asked, *others = facts
    insertions = [
        Insertion(depth=float(place), text=fact.statement, is_decoy=True)
        for place, fact in zip(random.random(num_decoys), others, strict=True)
    ]
    if has_answer:
        insertions.append(Insertion(depth=depth, text=asked.statement))
    return Task(
        insertions=tuple(insertions),
        question=asked.question + _OR_NONE,
        answer=asked.answer if has_answer else "none",
        forbidden=tuple(word for fact in facts for word in (fact.key, fact.answer)),
        depth=depth,
    )


def counting(random: np.random.Generator, *, split: Split, depths: list[float]) -> Task:
    """One count for each depth, in order."""
    manner, animal, counted = _one_of(split, random, words.MANNERS, words.ANIMALS, words.COUNTED)
    counts = [int(count) for count in random.choice(np.arange(2, 100), len(depths), replace=False)]
    who = f"{manner} {animal}"
    return Task(
        insertions=tuple(
            Insertion(depth=depth, text=f"The {who} counted {count} {counted}.")
            for depth, count in zip(depths, counts, strict=True)
        ),
        question=f"How many {counted} did the {who} count each time? Answer with a JSON list of numbers, in order "
        "of appearance.",
        answer=counts,
        forbidden=(who,),
    )


def _one_of(split: Split, random: np.random.Generator, *pools: tuple[str, ...]) -> tuple[str, ...]:
    """One word of each pool, in a combination that belongs to the split."""
    while True:
        drawn = tuple(str(random.choice(pool)) for pool in pools)
        if names_of(split, [drawn]):
            return drawn


def reasoning(random: np.random.Generator, *, split: Split, depths: list[float]) -> Task:
    """Three statements that answer only together.

    Args:
        random: source of every choice.
        split: whose names.
        depths: three places.
    """
    make = (_order, _order, _remainder)[random.integers(3)]
    statements, question, answer, forbidden = make(random, split)
    order = random.permutation(3)
    return Task(
        insertions=tuple(
            Insertion(depth=depth, text=statements[index]) for depth, index in zip(depths, order, strict=True)
        ),
        question=question,
        answer=answer,
        forbidden=forbidden,
    )


Statements = tuple[list[str], str, str, tuple[str, ...]]

# (statement on two places, question for the first of all, question for the last of all)
_ORDERS = (
    (
        "The tower of {} was built before the tower of {}.",
        "Which place's tower was built first?",
        "Which place's tower was built last?",
    ),
    (
        "The lake of {} is deeper than the lake of {}.",
        "Which place has the deepest lake?",
        "Which place has the shallowest lake?",
    ),
    (
        "The night train stops in {} before it stops in {}.",
        "Where does the night train stop first?",
        "Where does the night train stop last?",
    ),
)


def _order(random: np.random.Generator, split: Split) -> Statements:
    """A chain of four places, stated in three pairs."""
    places = _keys(split, random, 4)
    form, about_first, about_last = _ORDERS[random.integers(len(_ORDERS))]
    statements = [form.format(places[i], places[i + 1]) for i in range(3)]
    if random.integers(2):
        return statements, about_first, places[0], tuple(places)
    return statements, about_last, places[3], tuple(places)


def _remainder(random: np.random.Generator, split: Split) -> Statements:
    """Three things, two of which go away."""
    (key,) = _keys(split, random, 1)
    kept, sold, lost = (str(thing) for thing in random.choice(words.THINGS, 3, replace=False))
    packed = [words.article(thing) for thing in random.permutation([kept, sold, lost]).tolist()]
    statements = [
        f"The keeper of {key} packed {packed[0]}, {packed[1]} and {packed[2]}.",
        f"The keeper of {key} sold the {sold}.",
        f"The keeper of {key} lost the {lost}.",
    ]
    question = f"Which thing did the keeper of {key} neither sell nor lose?"
    return statements, question, kept, (key, kept, sold, lost)
