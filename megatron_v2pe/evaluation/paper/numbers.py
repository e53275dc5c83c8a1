"""Published numbers of the paper and of the release's model card, beside which ours are printed, in percent.

Source: the tables of `V2PE:README.md` (released models) and of the paper (arXiv 2412.09616). The card's average of
MileBench, 72.5, is not the mean of its three columns (73.0), nor is its average of general benchmarks that of its nine;
compare columns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the tables.

    Attributes:
        title: as printed.
        benchmark: name of the benchmark.
        metric: name of our metric; empty is the first.
        card: InternVL2-V2PE-32K as released (model card).
        paper: InternVL2-V2PE-32K of the paper; None where the paper has no such number.
        base: InternVL2-2B, from which it was trained; None where the tables have no such number.
        caveat: what keeps the number from being matched exactly; empty where the release has all settings.
    """

    title: str
    benchmark: str
    metric: str = ""
    card: float | None
    paper: float | None
    base: float | None
    caveat: str = ""


_MILEBENCH = (
    "which letter rule scored it was not published; trained on MileBench's training sets, so not zero-shot"
)
_NIAH = "the stride of each number was not published; the README's examples use 64"

COLUMNS = (
    Column(title="ChartQA", benchmark="chartqa", card=76.4, paper=77.3, base=71.7),
    Column(title="DocVQA", benchmark="docvqa", card=83.9, paper=84.9, base=86.9),
    Column(title="AI2D", benchmark="ai2d", card=73.2, paper=73.7, base=74.1),
    Column(title="InfoVQA", benchmark="infovqa", card=55.9, paper=56.5, base=58.9),
    Column(title="SQA", benchmark="scienceqa", card=94.9, paper=94.9, base=94.1),
    Column(
        title="POPE",
        benchmark="pope",
        card=88.8,
        paper=88.7,
        base=85.2,
        caveat="that it is the mean F1 of the three categories is not said; the release prints them apart",
    ),
    Column(title="MMMU val", benchmark="mmmu-val", card=36.6, paper=36.1, base=36.3),
    Column(
        title="MMBench EN",
        benchmark="mmbench-en",
        card=73.5,
        paper=73.8,
        base=73.4,
        caveat="of the test split, whose answers only the MMBench server has; ours is of the development split",
    ),
    Column(title="SEED-I", benchmark="seed-i", card=71.2, paper=71.2, base=70.9),
    Column(
        title="MM-NIAH Image",
        benchmark="mm-niah",
        metric="Image",
        card=78.1,
        paper=72.3,
        base=23.0,
        caveat=_NIAH,
    ),
    Column(
        title="MM-NIAH Text",
        benchmark="mm-niah",
        metric="Text",
        card=85.7,
        paper=68.1,
        base=18.9,
        caveat=_NIAH,
    ),
    Column(
        title="MM-NIAH Avg", benchmark="mm-niah", metric="Avg", card=81.8, paper=70.2, base=21.0, caveat=_NIAH
    ),
    Column(
        title="MileBench T",
        benchmark="milebench",
        metric="T",
        card=65.5,
        paper=58.5,
        base=58.2,
        caveat=_MILEBENCH,
    ),
    Column(
        title="MileBench S",
        benchmark="milebench",
        metric="S",
        card=56.4,
        paper=58.2,
        base=54.5,
        caveat=_MILEBENCH,
    ),
    Column(
        title="MileBench NI",
        benchmark="milebench",
        metric="NI",
        card=97.2,
        paper=51.1,
        base=37.0,
        caveat=_MILEBENCH,
    ),
    Column(
        title="MileBench Avg",
        benchmark="milebench",
        metric="Avg",
        card=72.5,
        paper=55.9,
        base=49.9,
        caveat="the card's average is not the mean of its columns",
    ),
    Column(
        title="Video-MME",
        benchmark="video-mme",
        card=50.7,
        paper=48.2,
        base=None,
        caveat="the release has no code for it: frames, prompt and subtitles are unknown",
    ),
    Column(title="MVBench", benchmark="mvbench", card=65.6, paper=None, base=None),
    Column(
        title="Long-VQA",
        benchmark="long-vqa",
        metric="Avg",
        card=None,
        paper=None,
        base=None,
        caveat="printed as curves only",
    ),
    Column(
        title="MM-NIAH-1M",
        benchmark="mm-niah-1m",
        metric="retrieval-image",
        card=None,
        paper=None,
        base=None,
        caveat="printed as curves only; the released script of it does not run",
    ),
    Column(
        title="MMLongBench NIAH", benchmark="mmlongbench", metric="NIAH", card=None, paper=None, base=None
    ),
)
