"""One sample from its spec: needle, document, exact length, record.

    spec --make_task--> needles, question --DocumentBuilder--> units --> record --read_back--> tokens --> resize

The length is what the loader itself finds in the record (`verify.read_back`), so a sample of N tokens is one of N
tokens in training: chat template, question, choices, answer and its end included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.synthesis.document import longvqa
from megatron_v2pe.synthesis.document.builder import DocumentBuilder, TooShort, Unit, realised_depths, resize
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.document.haystack import Haystack, TextStream
from megatron_v2pe.synthesis.document.records import Prompted, internvl_record
from megatron_v2pe.synthesis.document.verify import check_record, entry_of, last_positions, read_back
from megatron_v2pe.synthesis.kinds import SampleSpec, depth_in_band
from megatron_v2pe.synthesis.material.corpus import Corpus
from megatron_v2pe.synthesis.material.pictures import ImageStore, Picture, PoolImage
from megatron_v2pe.synthesis.material.vqa import VqaItem
from megatron_v2pe.synthesis.split import Split, generator_for
from megatron_v2pe.synthesis.tasks.image_tasks import Studio
from megatron_v2pe.synthesis.tasks.make_task import make_task
from megatron_v2pe.synthesis.tasks.task import Task

GENERATOR_VERSION = 1
_CORRECTIONS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Materials:
    """What samples of one split are made from.

    Attributes:
        split: which.
        corpus: folder of the passages' store.
        pool: images; empty where documents have none.
        questions: of Long-VQA; empty where no such kind is asked for.
        settings: tokenizer, template and tiling, without a limit of length.
        text_per_image: tokens of text after which a document has an image.
        num_decoys: facts or figures that only look like the answer.
    """

    split: Split
    corpus: Path
    pool: tuple[PoolImage, ...]
    questions: tuple[VqaItem, ...]
    settings: SampleSettings
    text_per_image: int
    num_decoys: int


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A document that has not its final length yet.

    Attributes:
        units: of the document.
        ask: question and answer that go with a list of units.
        stream: text to make it longer.
        forbidden: words that only needles may have.
        depth: what reports group by; None uses the needles' mean.
    """

    units: list[Unit]
    ask: Callable[[Sequence[Unit]], Prompted]
    stream: TextStream
    forbidden: tuple[str, ...] = ()
    depth: float | None = None


class Composer:
    """Makes samples; one in each worker.

    Args:
        materials: see there.
        store: where images go.

    Raises:
        DataError: the split has no text.
    """

    def __init__(self, materials: Materials, store: ImageStore) -> None:
        self._materials, self._store = materials, store
        settings = materials.settings
        self._counter = TokenCounter(settings)
        self._haystack = Haystack(
            Corpus(materials.corpus, materials.split), self._counter, settings.text.tokenizer
        )
        self._tokens_per_tile = settings.text.tokens_per_tile
        self._entry = entry_of(store.out, settings.tiling)
        self._studio = None
        if materials.pool:
            self._studio = Studio(
                pool=materials.pool,
                store=store,
                tile_size=settings.tiling.image_size,
                split=materials.split,
            )

    def compose(self, spec: SampleSpec) -> dict[str, Any]:
        """The checked record of a sample; its images are in the store, not flushed.

        Text is added and removed until the loader finds the wanted tokens; mostly it does at once.

        Raises:
            DataError: the length is too short for the kind, or a source cannot be read.
            BadRecord: a check failed, which is a mistake of ours.
        """
        try:
            return self._with_exact_length(spec, self._draft(spec))
        except TooShort as error:
            raise DataError(
                f"--tokens: {spec.tokens} is too short for {spec.kind}: besides template and question, {error.needed} "
                "tokens are needed for what the document must have; ask for longer samples, fewer --decoys, or a "
                "smaller --max-dynamic-patch"
            ) from None

    def _draft(self, spec: SampleSpec) -> _Draft:
        random = spec.generator()
        is_long_question = spec.kind.startswith("longvqa")
        return self._long_question(spec, random) if is_long_question else self._needles(spec, random)

    def _with_exact_length(self, spec: SampleSpec, draft: _Draft) -> dict[str, Any]:
        for _ in range(_CORRECTIONS):
            record = self._record(spec, draft)
            layout = read_back(record, entry=self._entry, settings=self._materials.settings)
            missing = spec.tokens - layout.num_tokens
            if missing == 0:
                check_record(record, spec)
                record["meta"]["v2pe_last_pos"] = last_positions(layout)
                return record
            units = resize(draft.units, missing, stream=draft.stream, counter=self._counter)
            draft = replace(draft, units=units)
        raise DataError(
            f"{spec.sample_id}: {_CORRECTIONS} corrections did not lead to exactly {spec.tokens} tokens; the "
            "texts or the tokenizer are very odd, try another --tokens or --seed"
        )

    def _needles(self, spec: SampleSpec, random: np.random.Generator) -> _Draft:
        materials = self._materials
        tiling = materials.settings.tiling
        largest = (tiling.max_tiles + tiling.use_thumbnail if tiling.dynamic else 1) * self._tokens_per_tile
        task = make_task(
            spec,
            random,
            studio=self._studio,
            num_decoys=materials.num_decoys,
            most_images=spec.tokens // (2 * largest),
        )
        stream = self._haystack.stream(random, forbidden=task.forbidden)
        builder = DocumentBuilder(
            task.insertions,
            size=spec.tokens - self._tokens_around(_asked(task, [])),
            stream=stream,
            next_picture=self._pool_pictures(random) if materials.pool else None,
            text_per_image=materials.text_per_image,
            counter=self._counter,
        )
        return _Draft(
            units=builder.build(),
            ask=lambda units: _asked(task, units),
            stream=stream,
            forbidden=task.forbidden,
            depth=task.depth,
        )

    def _long_question(self, spec: SampleSpec, random: np.random.Generator) -> _Draft:
        materials = self._materials
        order = generator_for("questions", spec.seed, spec.split, spec.kind).permutation(
            len(materials.questions)
        )
        item = materials.questions[order[spec.number % len(order)]]
        others = [other.image for other in materials.questions if other.image.digest != item.image.digest]
        if not others:
            raise DataError("--vqa: only one image falls into this split; give questions about more images")
        around = self._tokens_around(
            Prompted(question="This is about image 888. " + item.question, answer=item.answer)
        )
        arguments: dict[str, Any] = {
            "others": others,
            "depth": depth_in_band(spec, random),
            "size": spec.tokens - around,
            "random": random,
            "store": self._store,
            "counter": self._counter,
        }
        if spec.kind == "longvqa-pages":
            made = longvqa.pages(item, **arguments)
        else:
            made = longvqa.paste(item, tiling=materials.settings.tiling, **arguments)
        stream = self._haystack.stream(random, forbidden=())
        asked = Prompted(question=made.question, answer=made.answer)
        return _Draft(units=made.units, ask=lambda units: asked, stream=stream)

    def _pool_pictures(self, random: np.random.Generator) -> Callable[[], Picture]:
        """Images of the pool in a random order, again and again."""
        pool, waiting = self._materials.pool, list[int]()

        def next_picture() -> Picture:
            if not waiting:
                waiting.extend(random.permutation(len(pool)).tolist())
            return self._store.copy(pool[waiting.pop()])

        return next_picture

    def _tokens_around(self, prompted: Prompted) -> int:
        """Tokens of a sample without its document."""
        message = "\n" + prompted.question + prompted.suffix
        return self._counter.conversation(message, prompted.answer_text, prompted.choice_pictures)

    def _record(self, spec: SampleSpec, draft: _Draft) -> dict[str, Any]:
        units = draft.units
        pictures = _pictures(units)
        visual = sum(self._counter.tiles(picture) for picture in pictures) * self._tokens_per_tile
        inserted = [unit.insertion for unit in units if unit.insertion is not None]
        depths = [round(depth, 5) for depth in realised_depths(units)]
        depth = draft.depth if draft.depth is not None else sum(depths) / max(1, len(depths))
        size = sum(unit.tokens for unit in units)
        stream = draft.stream
        meta = {
            "kind": spec.kind,
            "split": spec.split,
            "seed": spec.seed,
            "generator_version": GENERATOR_VERSION,
            "placed_depth": depths[0] if len(depths) == 1 else depths,
            "context_length": size,
            "context_length_text": size - visual,
            "context_length_image": visual,
            "needles": [each.text or "image" for each in inserted if not each.is_decoy],
            "decoys": [each.text or "image" for each in inserted if each.is_decoy and each.text],
            "forbidden": list(draft.forbidden),
            "passages": list(stream.used),
            "reuse_ratio": round(stream.repeated_tokens / max(1, stream.tokens), 4),
        }
        return internvl_record(
            sample_id=spec.sample_id,
            context=_context(units),
            pictures=pictures,
            prompted=draft.ask(units),
            length=spec.tokens,
            depth=spec.band_centre(depth),
            meta=meta,
        )


def _asked(task: Task, units: Sequence[Unit]) -> Prompted:
    """Question and answer for a document; counts of images depend on it."""
    answer = task.answer
    if answer is None:
        answer = [unit.insertion.count if unit.insertion else 0 for unit in units for _ in unit.pictures]
    return Prompted(
        question=task.question, answer=answer, choices=task.choices, choice_pictures=task.choice_pictures
    )


def _pictures(units: Sequence[Unit]) -> list[Picture]:
    return [picture for unit in units for picture in unit.pictures]


def _context(units: Sequence[Unit]) -> str:
    """The document; it starts without a blank and ends with a line break."""
    return "".join(unit.text for unit in units).lstrip() + "\n"
