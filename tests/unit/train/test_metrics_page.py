"""docs/metrics.md explains every number that a step's line has, and no other."""

import dataclasses
import re
from pathlib import Path

from megatron_v2pe.train.metrics.metrics_log import StepMetrics

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_every_field_has_a_row():
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.M)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(field.name for field in dataclasses.fields(StepMetrics))
