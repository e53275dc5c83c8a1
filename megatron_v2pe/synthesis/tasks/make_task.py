"""From a kind's name to its task; the one place where kinds, depths and numbers of needles meet."""

from __future__ import annotations

import numpy as np

from megatron_v2pe.synthesis.kinds import SampleSpec, depth_in_band, spread_depths
from megatron_v2pe.synthesis.tasks import image_tasks, text_tasks
from megatron_v2pe.synthesis.tasks.image_tasks import Studio
from megatron_v2pe.synthesis.tasks.task import Task

MOST_COUNTED_TEXTS = 3
MOST_COUNTED_IMAGES = 5


def make_task(
    spec: SampleSpec,
    random: np.random.Generator,
    *,
    studio: Studio | None,
    num_decoys: int,
    most_images: int,
) -> Task:
    """Needles, question and answer of a sample, of any kind but Long-VQA.

    Args:
        spec: which sample.
        random: source of every choice.
        studio: makes images; kinds of images need it.
        num_decoys: facts or figures that only look like the answer, for the kinds that have them.
        most_images: images with figures to count that fit into half of the sample.
    """
    if spec.kind.startswith("text-"):
        return _text_task(spec, random, num_decoys)
    if studio is None:
        raise ValueError(f"{spec.kind} without a studio")
    return _image_task(spec, random, studio, num_decoys, most_images)


def _text_task(spec: SampleSpec, random: np.random.Generator, num_decoys: int) -> Task:
    kind, split = spec.kind, spec.split
    if kind == "text-retrieval":
        return text_tasks.retrieval(random, split=split, depth=depth_in_band(spec, random))
    if kind == "text-counting":
        number = int(random.integers(1, MOST_COUNTED_TEXTS + 1))
        return text_tasks.counting(random, split=split, depths=_depths(spec, random, number))
    if kind == "text-reasoning":
        return text_tasks.reasoning(random, split=split, depths=spread_depths(random, 3))
    return text_tasks.decoys(
        random,
        split=split,
        depth=depth_in_band(spec, random),
        num_decoys=num_decoys,
        has_answer=kind == "text-decoys",
    )


def _image_task(
    spec: SampleSpec, random: np.random.Generator, studio: Studio, num_decoys: int, most_images: int
) -> Task:
    kind = spec.kind
    if kind == "image-counting":
        number = int(random.integers(1, max(1, min(MOST_COUNTED_IMAGES, most_images)) + 1))
        return image_tasks.counting(random, studio=studio, depths=_depths(spec, random, number))
    depth = depth_in_band(spec, random)
    if kind == "image-retrieval":
        return image_tasks.retrieval(random, studio=studio, depth=depth)
    if kind == "image-jigsaw":
        return image_tasks.jigsaw(random, studio=studio, depth=depth)
    if kind == "image-multiview":
        return image_tasks.multiview(random, studio=studio, depth=depth)
    return image_tasks.decoys(
        random, studio=studio, depth=depth, num_decoys=num_decoys, has_answer=kind == "image-decoys"
    )


def _depths(spec: SampleSpec, random: np.random.Generator, number: int) -> list[float]:
    """A single needle keeps to its band; several spread over the document."""
    return [depth_in_band(spec, random)] if number == 1 else spread_depths(random, number)
