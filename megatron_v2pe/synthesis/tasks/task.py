"""What is hidden in a document and asked about it; made by the kinds, placed by `document.builder`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.synthesis.material.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """One thing to place in the document: a sentence, or images that follow one another.

    Attributes:
        depth: 0 (first) .. 1 (last), wanted share of the other tokens of the document that precede it.
        text: a sentence; empty for images.
        pictures: images; empty for a sentence.
        is_decoy: it only looks like the answer's source.
        count: how many figures were drawn onto the image, for counting tasks.
    """

    depth: float
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    is_decoy: bool = False
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question and everything that must be in the document for it.

    Attributes:
        insertions: needles and decoys.
        question: without choices.
        answer: an index into the choices, a list of counts, or a text; None asks for the counts of all images.
        choices: texts to choose from.
        choice_pictures: images to choose from.
        forbidden: words that the rest of the document must not have, so that nothing else answers.
        depth: place in 0..1 that the report groups by, where it is not the needles' own mean.
    """

    insertions: tuple[Insertion, ...]
    question: str
    answer: int | str | list[int] | None
    choices: tuple[str, ...] = ()
    choice_pictures: tuple[Picture, ...] = ()
    forbidden: tuple[str, ...] = ()
    depth: float | None = None
