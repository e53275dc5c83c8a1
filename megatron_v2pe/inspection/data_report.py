"""A mixture from files to tables: measure, plan one epoch, describe; what is wrong is shown, then raised.

meta.json --index_dataset, one by one--> indexes --MixturePlan--> epoch 0 --data.report--> text
--report: report.txt, datasets.csv, packs.csv, bad.txt and the pictures of data_pictures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_lengths
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import writable_folder, write_atomic
from megatron_v2pe.data.index.annotation_index import DatasetIndex, index_dataset
from megatron_v2pe.data.index.bad_causes import by_cause, cause_lines
from megatron_v2pe.data.loader import plan_mixture
from megatron_v2pe.data.plan.epoch_plan import TooManyBadError
from megatron_v2pe.data.report import (
    DatasetRow,
    PlanReport,
    data_table,
    datasets_csv,
    describe_datasets,
    describe_plan,
    notice_lines,
    packs_csv,
)
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.sources.meta import read_meta
from megatron_v2pe.inspection.data_pictures import draw_pictures
from megatron_v2pe.inspection.figures import pyplot, save_figure


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What `index-data` says.

    Attributes:
        text: the table.
        bad_text: bad lines, by cause.
        problem: why a run would refuse the data; None when it would not.
    """

    text: str
    bad_text: str
    problem: DataError | None


def overview(
    config: RunConfig,
    hf_folder: Path,
    *,
    workers: int,
    report_dir: str | None = None,
    show_progress: bool = False,
) -> Overview:
    """Measure a mixture, plan its first epoch, and describe both.

    Args:
        config: sections data, optim, model and runtime are read.
        hf_folder: of the checkpoint whose tokenizer counts.
        workers: processes that measure.
        report_dir: folder for tables and pictures; none are written without it.
        show_progress: draw progress bars.

    Raises:
        ConfigError, DataError: a mistake that leaves nothing to show.
    """
    if workers < 1:
        raise ConfigError(f"--workers is {workers}, but must be at least 1")
    check_lengths(config.data)
    if report_dir is not None:  # a missing library or folder is better known now than after an hour
        pyplot()
        writable_folder(report_dir, field="--report")
    settings = sample_settings(config, read_architecture(hf_folder), hf_folder)
    cache_dir = config.data.cache_dir or str(Path(config.runtime.run_dir) / "data_cache")
    indexes = [
        index_dataset(
            entry, settings=settings, cache_dir=cache_dir, workers=workers, show_progress=show_progress
        )
        for entry in read_meta(config.data.meta)
    ]
    plan, report, problem = None, None, None
    try:
        _, plan = plan_mixture(config, settings)
        report = describe_plan(
            plan,
            max_pack_tokens=config.data.max_pack_tokens,
            max_pack_tiles=config.data.max_pack_tiles,
            batches=batch_schedule(config),
            balance=config.data.balance,
        )
    except TooManyBadError as error:  # they are listed below
        problem = DataError(error.summary)
    except DataError as error:  # also of a plan without a first epoch
        plan, problem = None, error
    rows = describe_datasets(indexes, plan)
    notices = notice_lines(indexes, exif=config.data.exif, alpha=config.data.alpha)
    text = data_table(rows, report, notices=notices)
    if report_dir is not None:
        files = _write_report(Path(report_dir), indexes, rows, report, table=text)
        text += "".join(f"{path}\n" for path in files)
    return Overview(text=text, bad_text=_bad_text(indexes, report_dir), problem=problem)


def _write_report(
    out: Path,
    indexes: Sequence[DatasetIndex],
    rows: Sequence[DatasetRow],
    plan: PlanReport | None,
    *,
    table: str,
) -> list[Path]:
    """Write all tables and pictures; returns the files."""
    bad = [sample for index in indexes for sample in index.bad]
    texts = {
        "report.txt": table,
        "datasets.csv": datasets_csv(rows),
        "bad.txt": "".join(f"{sample.kind}\t{sample.sample_id}\t{sample.message}\n" for sample in bad),
    }
    texts |= {"packs.csv": packs_csv(plan)} if plan is not None else {}
    for name, text in texts.items():
        write_atomic(out / name, text)
    pictures = draw_pictures(indexes, rows, plan)
    for name, figure in pictures.items():
        save_figure(figure, out / name)
    return [out / name for name in (*texts, *pictures)]


def _bad_text(indexes: Sequence[DatasetIndex], report_dir: str | None) -> str:
    bad = [sample for index in indexes for sample in index.bad]
    lines = [line if line.startswith("  ") else f"bad: {line}" for line in cause_lines(bad)]
    if len(by_cause(bad)) < len(bad):
        where = (
            f"all in {report_dir}/bad.txt" if report_dir else "--report OUT writes all of them to OUT/bad.txt"
        )
        lines.append(f"{len(bad)} bad; {where}")
    return "".join(f"{line}\n" for line in lines)
