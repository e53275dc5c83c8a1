"""Published numbers of the paper and of the release's model card, beside which ours are printed, in percent.

Source: the tables of `V2PE:README.md` (released models) and of the paper (arXiv 2412.09616). The card's average of
MileBench, 72.5, is not the mean of its three columns (73.0), nor is its average of general benchmarks that of its nine;
compare columns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One number of the tables.

    Attributes:
        title: as printed.
        benchmark: name of the benchmark.
        metric: name of our metric; empty is the first.
        published: in percent, of InternVL2-V2PE-32K as released (model card), of the model of that name in the paper,
            and of InternVL2-2B, from which they were trained; None where the tables have no such number.
        caveat: what keeps the number from being matched exactly; empty where the release has all settings.
    """

    title: str
    benchmark: str
    metric: str
    published: tuple[float | None, float | None, float | None]
    caveat: str = ""

    @property
    def card(self) -> float | None:
        """The model card's."""
        return self.published[0]


_NONE = (None, None, None)
_POPE = "that it is the mean F1 of the three categories is not said; the release prints them apart"
_MMBENCH = "of the test split, whose answers only the MMBench server has; ours is of the development split"
_NIAH = "the stride of each number was not published; the README's examples use 64"
_MILEBENCH = (
    "which letter rule scored it was not published; trained on MileBench's training sets, so not zero-shot"
)
_VIDEO = "the release has no code for it: frames, prompt and subtitles are unknown"
_LONGBENCH = (
    "of V2PE-256K in its authors' paper, on 100 questions of each set that they drew; not of this model"
)

COLUMNS = (
    Column("ChartQA", "chartqa", "", (76.4, 77.3, 71.7)),
    Column("DocVQA", "docvqa", "", (83.9, 84.9, 86.9)),
    Column("AI2D", "ai2d", "", (73.2, 73.7, 74.1)),
    Column("InfoVQA", "infovqa", "", (55.9, 56.5, 58.9)),
    Column("SQA", "scienceqa", "", (94.9, 94.9, 94.1)),
    Column("POPE", "pope", "", (88.8, 88.7, 85.2), _POPE),
    Column("MMMU val", "mmmu-val", "", (36.6, 36.1, 36.3)),
    Column("MMBench EN", "mmbench-en", "", (73.5, 73.8, 73.4), _MMBENCH),
    Column("SEED-I", "seed-i", "", (71.2, 71.2, 70.9)),
    Column("MM-NIAH Image", "mm-niah", "Image", (78.1, 72.3, 23.0), _NIAH),
    Column("MM-NIAH Text", "mm-niah", "Text", (85.7, 68.1, 18.9), _NIAH),
    Column("MM-NIAH Avg", "mm-niah", "Avg", (81.8, 70.2, 21.0), _NIAH),
    Column("MileBench T", "milebench", "T", (65.5, 58.5, 58.2), _MILEBENCH),
    Column("MileBench S", "milebench", "S", (56.4, 58.2, 54.5), _MILEBENCH),
    Column("MileBench NI", "milebench", "NI", (97.2, 51.1, 37.0), _MILEBENCH),
    Column(
        "MileBench Avg",
        "milebench",
        "Avg",
        (72.5, 55.9, 49.9),
        "the card's average is not the mean of its columns",
    ),
    Column("Video-MME", "video-mme", "", (50.7, 48.2, None), _VIDEO),
    Column("MVBench", "mvbench", "", (65.6, None, None)),
    Column("Long-VQA", "long-vqa", "Avg", _NONE, "printed as curves only"),
    Column(
        "MM-NIAH-1M",
        "mm-niah-1m",
        "retrieval-image",
        _NONE,
        "printed as curves only; the released script of it does not run",
    ),
    *(
        Column(f"MMLongBench {category}", "mmlongbench", category, _NONE, _LONGBENCH)
        for category in ("NIAH", "VRAG", "ICL", "DocVQA")
    ),
)
