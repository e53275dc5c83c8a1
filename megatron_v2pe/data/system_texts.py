"""Which system text a run trains, so that its checkpoint answers with it.

records' own, `system` of the meta json, else the model's --one text in all samples--> `system_message` of config.json

Where samples have different ones, no single text is what was trained: config.json keeps what it has, and the
run says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.samples.formats import DIGEST_MARK
from megatron_v2pe.data.text.templates import ChatTemplate, get_template

_SHOWN = 3
_WAY_OUT = "answers use that of the model or template, or the one named by --system"


def trained_system(indexes: Sequence[DatasetIndex], template: ChatTemplate) -> tuple[str | None, str]:
    """The system text that all samples of a mixture are trained with.

    Args:
        indexes: measured data sets.
        template: of the run, with the text of records that have none.

    Returns:
        The text, empty for the template's own, None where samples differ; and a sentence about why there is none.
    """
    counts: dict[str, int] = {}
    for index in indexes:
        for text, count in _of_data_set(index, usual=template.system_text).items():
            text = text.strip() if template.strip_values else text
            counts[text] = counts.get(text, 0) + count
    if len(counts) == 1:
        (text,) = counts
        if text.startswith(DIGEST_MARK):
            return None, f"the system text of the records is too long to be kept in checkpoints; {_WAY_OUT}"
        return ("" if text == get_template(template.name).system_text else text), ""
    shown = sorted(counts.items(), key=lambda each: -each[1])[:_SHOWN]
    named = "; ".join(f"{count:,} records: {shortened(text)}" for text, count in shown)
    more = "; ..." if len(counts) > _SHOWN else ""
    return None, (
        f"samples have {len(counts)} different system texts ({named}{more}), so checkpoints record none; {_WAY_OUT}"
    )


def _of_data_set(index: DatasetIndex, *, usual: str) -> dict[str, int]:
    """System texts of the records that a data set draws, and how many have each."""
    found = dict(index.systems)
    without = len(np.unique(np.asarray(index.line_numbers))) - sum(found.values())
    if without > 0:
        text = index.entry.system or usual
        found[text] = found.get(text, 0) + without
    return found
