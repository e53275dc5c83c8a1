"""The sources of a run, read once: texts into the store, images and questions with their hashes and sizes.

    texts  --build_corpus--> out/unfinished/passages.*
    images --inspect_all---> pool of the split        questions --> those of the split, their images inspected too

A file that cannot be used is skipped with a warning and listed beside the data; a folder with nothing usable is an
error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.synthesis.material.corpus import Corpus, build_corpus, text_files
from megatron_v2pe.synthesis.material.pictures import PoolImage, image_files, inspect_all
from megatron_v2pe.synthesis.material.vqa import RawQuestion, VqaItem, read_questions
from megatron_v2pe.synthesis.settings import SynthesisConfig
from megatron_v2pe.synthesis.split import digest, split_of

logger = logging.getLogger(__name__)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Material of one split, and what it was read from.

    Attributes:
        digest: of all material of both splits.
        pool: images of the split.
        questions: Long-VQA questions of the split.
        skipped: file -> why it is not used.
    """

    digest: str
    pool: tuple[PoolImage, ...]
    questions: tuple[VqaItem, ...]
    skipped: dict[str, str]


def read_sources(config: SynthesisConfig, *, store: Path, max_pixels: int, workers: int) -> Sources:
    """Read everything and write the store of passages.

    Args:
        config: names the folders.
        store: existing folder.
        max_pixels: largest image that is used.
        workers: processes for reading images.

    Raises:
        DataError: a folder or file is missing, or the split gets nothing of a kind of material that it needs.
    """
    files = text_files(Path(config.texts))
    with tqdm(total=len(files), desc="texts", unit="file", disable=None) as bar:
        corpus = build_corpus(files, store=store, held_out=config.held_out, on_file=bar.update)
    Corpus(store, config.split)  # a split without text is an error here and not in every worker
    skipped = dict(corpus.skipped)
    pool: list[PoolImage] = []
    if config.images:
        paths = image_files(Path(config.images), option="--images")
        pool = _distinct(_inspected(paths, max_pixels, workers, skipped))
    questions = _read_vqa(config, max_pixels, workers, skipped) if config.vqa else []
    identity = [corpus.digest, [image.digest for image in pool], [_identity(item) for item in questions]]
    _report_skipped(skipped)
    return Sources(
        digest=digest(json.dumps(identity)),
        pool=_of_split(pool, config) if config.images else (),
        questions=_questions_of_split(questions, config) if config.vqa else (),
        skipped=skipped,
    )


def _inspected(
    paths: Iterable[Path], max_pixels: int, workers: int, skipped: dict[str, str]
) -> list[PoolImage]:
    """Usable images; the others are noted in `skipped`."""
    paths = list(paths)
    found: list[PoolImage] = []
    with tqdm(total=len(paths), desc="images", unit="file", disable=None) as bar:
        for path, result in zip(
            paths, inspect_all(paths, max_pixels=max_pixels, workers=workers), strict=True
        ):
            if isinstance(result, str):
                skipped[str(path)] = result
            else:
                found.append(result)
            bar.update()
    if not found:
        raise DataError(f"none of {len(paths)} images can be used: {skipped[str(paths[0])]}")
    return found


def _distinct(images: Iterable[PoolImage]) -> list[PoolImage]:
    """One of each content, ordered by it, so that names and order of files do not matter."""
    by_digest: dict[str, PoolImage] = {}
    for image in images:
        by_digest.setdefault(image.digest, image)
    return [by_digest[key] for key in sorted(by_digest)]


def _of_split(pool: list[PoolImage], config: SynthesisConfig) -> tuple[PoolImage, ...]:
    own = tuple(image for image in pool if split_of(image.digest, held_out=config.held_out) == config.split)
    if not own:
        raise DataError(
            f"--images: none of the {len(pool)} different images falls into split {config.split!r}; give more "
            "images, or change --held-out"
        )
    return own


def _read_vqa(
    config: SynthesisConfig, max_pixels: int, workers: int, skipped: dict[str, str]
) -> list[VqaItem]:
    raw = list(read_questions(Path(config.vqa), Path(config.vqa_images)))
    if not raw:
        raise DataError(f"--vqa: {config.vqa}: no record has exactly one image; Long-VQA is made of those")
    paths = [Path(name) for name in dict.fromkeys(question.image for question in raw)]
    by_path = {image.path: image for image in _inspected(paths, max_pixels, workers, skipped)}
    return [_item(question, by_path[question.image]) for question in raw if question.image in by_path]


def _item(raw: RawQuestion, image: PoolImage) -> VqaItem:
    return VqaItem(image=image, question=raw.question, answer=raw.answer)


def _identity(item: VqaItem) -> list[str]:
    return [item.image.digest, item.question, item.answer]


def _questions_of_split(questions: list[VqaItem], config: SynthesisConfig) -> tuple[VqaItem, ...]:
    own = tuple(
        item for item in questions if split_of(item.image.digest, held_out=config.held_out) == config.split
    )
    if not own:
        raise DataError(
            f"--vqa: none of the {len(questions)} questions falls into split {config.split!r}; give more, or change "
            "--held-out"
        )
    return own


def _report_skipped(skipped: dict[str, str]) -> None:
    if skipped:
        shown = "; ".join(list(skipped.values())[:_SHOWN])
        logger.warning(
            "%d source files are not used: %s%s", len(skipped), shown, " ..." if len(skipped) > _SHOWN else ""
        )
