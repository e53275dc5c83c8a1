"""Metrics by likeness of texts, each named by the paper that defines it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from megatron_v2pe.core.errors import ConfigError

AnlsRule = Literal["official", "owl"]


def _library(name: str, extra: str = "eval") -> Any:
    """A metric's package, imported when it is needed.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"this metric needs the package {name}, which is not installed; run  pip install 'megatron_v2pe[{extra}]'"
        ) from None


def exact(prediction: str, answers: Sequence[str]) -> float:
    """Equality after blanks at both ends and case are dropped, with any of the answers."""
    said = prediction.strip().lower()
    return float(any(said == answer.strip().lower() for answer in answers))


def relaxed_correctness(prediction: str, target: str, *, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (Masry et al., 2022; Methani et al., 2020): numbers within 5 %, texts equal.

    A number may end with %. A target of zero, and any text, is compared as text without case.

    Example: `relaxed_correctness("10.4", "10")` is 1, `relaxed_correctness("10.6", "10")` is 0.
    """
    said, wanted = _number(prediction.strip()), _number(target)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= tolerance)
    return float(prediction.strip().lower() == target.lower())


def relaxed_correctness_owl(prediction: str, target: str) -> float:
    """The variant of the V2PE release's Long-VQA: a prediction of zero is compared as text, too."""
    if _number(prediction) == 0.0:
        return float(prediction.lower() == target.lower())
    return relaxed_correctness(prediction, target)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(prediction: str, answers: Sequence[str], *, rule: AnlsRule = "official") -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., ST-VQA, 2019).

    official  as DocVQA's server: case and runs of blanks do not count, 0.5 is kept, less is zero; the distance of
              normalised texts is divided by the length of the raw ones
    owl       as the V2PE release's Long-VQA: case does not count, 0.5 is zero, too

    Args:
        prediction: what the model said.
        answers: any of them counts.
        rule: see above.

    Returns:
        0, or 0.5..1.
    """
    distance = _library("rapidfuzz.distance").Levenshtein.distance
    best = 0.0
    for answer in answers:
        if rule == "official":
            edits = distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        else:
            edits = distance(answer.lower(), prediction.lower())
        longest = max(len(answer), len(prediction))
        share = edits / longest if longest else 0.0
        is_near = share <= 0.5 if rule == "official" else share < 0.5
        best = max(best, 1.0 - share if is_near else 0.0)
    return best


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L (Lin, 2004) as the package `rouge` computes it, which MileBench uses; 0 for an empty text.

    The package `rouge-score` gives other numbers (stemming, one sentence, beta), so it is no substitute.
    """
    if not prediction.strip(" .") or not reference.strip(" ."):
        return 0.0  # nothing is left of it once sentences are split, which the package refuses
    scorer = _library("rouge").Rouge(metrics=["rouge-l"])
    usual = sys.getrecursionlimit()
    # It calls itself once for each word of a sentence; an answer that repeats a word is such a sentence.
    sys.setrecursionlimit(usual + 2 * (len(prediction.split()) + len(reference.split())))
    try:
        return float(scorer.get_scores(prediction, reference)[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(usual)


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al., 2002) by sacrebleu: tokenizer 13a, lower case, no smoothing; 0..1.

    The release's Long-VQA uses pycocoevalcap with a Java tokenizer, so captions and answers may differ by points.
    """
    sacrebleu = _library("sacrebleu")
    width = max(map(len, references))
    columns = [[group[min(i, len(group) - 1)] for group in references] for i in range(width)]
    score = sacrebleu.corpus_bleu(list(predictions), columns, lowercase=True, smooth_method="none")
    return min(1.0, float(score.score) / 100)  # equal texts give 100.00000000000004
