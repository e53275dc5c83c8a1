"""All benchmarks by the name that commands use."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.benchmarks.base import Benchmark
from megatron_v2pe.evaluation.benchmarks.harness_questions import HarnessQuestions
from megatron_v2pe.evaluation.benchmarks.sets import vqa
from megatron_v2pe.evaluation.benchmarks.sets.choices import MMBench, ScienceQA, SeedImage
from megatron_v2pe.evaluation.benchmarks.sets.long_vqa import LongVQA
from megatron_v2pe.evaluation.benchmarks.sets.milebench import MileBench
from megatron_v2pe.evaluation.benchmarks.sets.mm_niah import MMNIAH, MMNIAHLong
from megatron_v2pe.evaluation.benchmarks.sets.mmlongbench import MMLongBench
from megatron_v2pe.evaluation.benchmarks.sets.mmmu import MMMU
from megatron_v2pe.evaluation.benchmarks.sets.pope import POPE
from megatron_v2pe.evaluation.benchmarks.sets.video import MVBench, VideoMME
from megatron_v2pe.evaluation.metrics.letters import LETTER_RULES, LetterRule

BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "mm-niah": MMNIAH,
    "mm-niah-1m": MMNIAHLong,
    "long-vqa": LongVQA,
    "milebench": MileBench,
    "chartqa": vqa.chartqa,
    "docvqa": vqa.docvqa,
    "ai2d": vqa.ai2d,
    "infovqa": vqa.infovqa,
    "scienceqa": ScienceQA,
    "pope": POPE,
    "mmmu-val": MMMU,
    "mmbench-en": MMBench,
    "seed-i": SeedImage,
    "mvbench": MVBench,
    "video-mme": VideoMME,
    "mmlongbench": MMLongBench,
}


# Not of the paper: questions of a harness, which scores their answers itself.
OTHERS: dict[str, Callable[[], Benchmark]] = {"lmms": HarnessQuestions}


def find_benchmark(name: str, *, letters: LetterRule = "release") -> Benchmark:
    """A benchmark by name.

    Args:
        name: as in `BENCHMARKS`.
        letters: which rule reads MileBench's letters.

    Raises:
        ConfigError: no such benchmark or rule; the nearest name is given.
    """
    if letters not in LETTER_RULES:
        raise ConfigError(f"--letters is {letters!r}, but must be one of {', '.join(LETTER_RULES)}")
    if name in OTHERS:
        return OTHERS[name]()
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise ConfigError(f"no benchmark is called {name!r}; {hint}")
    return MileBench(letters) if name == "milebench" else BENCHMARKS[name]()
