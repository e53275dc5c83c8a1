"""A whole run: read the sources, make what is not there yet in any number of processes, join, report what was made.

    sources -> manifest -> parts (workers) -> KIND.jsonl, mm_niah/, meta.json

What a part contains depends on the plan and the sources only, so workers make whichever part is next, and a run that
was killed continues with the parts that are missing.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.data.samples.settings import SampleSettings, sample_settings
from megatron_v2pe.synthesis.document.compose import GENERATOR_VERSION, Materials
from megatron_v2pe.synthesis.kinds import plan
from megatron_v2pe.synthesis.parts import join_parts, parts_of
from megatron_v2pe.synthesis.settings import LOCK, META, SKIPPED, WORK, SynthesisConfig, claim, open_folder
from megatron_v2pe.synthesis.sources import Sources, read_sources
from megatron_v2pe.synthesis.workers import make_parts

logger = logging.getLogger(__name__)
_NO_LIMIT = 2**40


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run made.

    Attributes:
        num_records: records in the folder.
        num_new: records made by this run; the others were there.
        seconds: wall time.
    """

    num_records: int
    num_new: int
    seconds: float


def synthesize(config: SynthesisConfig, *, hf_folder: str | Path, data: DataConfig) -> Outcome:
    """Make a folder of data, or finish it.

    Args:
        config: what and how much.
        hf_folder: Hugging Face folder whose tokenizer, template and tile size count.
        data: tiling that training will use.

    Raises:
        ConfigError: an option cannot work, or the folder holds other data.
        DataError: a source cannot be used.
        CheckpointError: the tokenizer cannot be read.
    """
    started = time.monotonic()
    settings = _settings(hf_folder, data)
    specs = plan(
        config.kinds,
        config.lengths,
        count=config.count,
        num_depths=config.num_depths,
        split=config.split,
        seed=config.seed,
    )
    out = Path(config.out)
    open_folder(out, config.content())
    with _alone(out):
        store = out / WORK
        store.mkdir(exist_ok=True)
        sources = read_sources(config, store=store, max_pixels=data.max_image_pixels, workers=config.workers)
        claim(out, _identity(config, settings, sources))
        if sources.skipped:
            write_atomic(out / SKIPPED, "".join(f"{why}\n" for why in sources.skipped.values()))
        parts = parts_of(specs, out)
        is_complete = (out / META).exists()
        missing = [] if is_complete else [part for part in parts if not part.path.exists()]
        materials = _materials(config, settings, sources, store)
        make_parts(missing, materials, out=out, workers=config.workers)
        if not is_complete:
            join_parts(parts, out, with_mm_niah=config.split == "eval", data=data)
        _clean(out)
    num_new = sum(len(part.specs) for part in missing)
    return Outcome(num_records=len(specs), num_new=num_new, seconds=time.monotonic() - started)


def _clean(out: Path) -> None:
    """Remove the folder of parts, and what killed runs left aside."""
    shutil.rmtree(out / WORK)
    for aside in [*out.glob(".*.tmp-*"), *out.glob("images/*/.*.tmp-*"), *out.glob("mm_niah/.*.tmp-*")]:
        aside.unlink()


def _settings(hf_folder: str | Path, data: DataConfig) -> SampleSettings:
    settings = sample_settings(RunConfig(data=data), read_architecture(hf_folder), hf_folder)
    return replace(settings, text=replace(settings.text, max_tokens=_NO_LIMIT))


def _identity(config: SynthesisConfig, settings: SampleSettings, sources: Sources) -> dict[str, Any]:
    """Everything that decides the content, as json."""
    return {
        **config.content(),
        "generator_version": GENERATOR_VERSION,
        "tokenizer": settings.text.tokenizer.fingerprint,
        "template": settings.text.template.name,
        "tokens_per_tile": settings.text.tokens_per_tile,
        "tiling": asdict(settings.tiling),
        "sources": sources.digest,
    }


def _materials(config: SynthesisConfig, settings: SampleSettings, sources: Sources, store: Path) -> Materials:
    return Materials(
        split=config.split,
        corpus=store,
        pool=sources.pool,
        questions=sources.questions,
        settings=settings,
        text_per_image=config.text_per_image,
        num_decoys=config.num_decoys,
    )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder while this one works."""
    with open(out / LOCK, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out: another synthesize is at work in {out}; wait for it") from None
        except OSError as error:
            logger.warning("%s: no file locks here (%s); do not start a second run", out, error)
        yield
