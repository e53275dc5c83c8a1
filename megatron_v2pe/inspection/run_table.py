"""A run as text: rows of a table, one column for each run; below it who waited for whom, and where two runs differ.

    RunRecord --run_rows--> {label: text} --runs_table--> lines for a terminal

Losses are given as means over the first and the last tenth of the steps, since one step alone says little.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.inspection.runs import RunRecord
from megatron_v2pe.train.metrics.stragglers import SlowRankFinder

_SHOWN_SOURCES = 12
_SHOWN_NUMBERS = 6
_NOT_RECORDED = "not recorded"
Line = dict[str, Any]


def run_rows(run: RunRecord) -> dict[str, str]:
    """Label to text, in the order of the table."""
    return {
        "steps": f"{run.lines[0]['step']} to {run.lines[-1]['step']}",
        "loss": _loss(run.lines),
        **_losses_by_source(run.lines),
        **_held_out(run.lines),
        **_asked(run.lines),
        "tokens": _tokens(run.lines),
        "tokens/s, median": _rates(run.lines),
        "TFLOP/s a rank, median": _flops(run.lines),
        "packs": _packs(run.lines),
        "positions": _positions(run.lines),
        "memory": _memory(run.lines),
        "time in steps": _time(run.lines),
        "blocked by saves": _saves(run.lines),
        "stragglers": stragglers(run.lines),
        "starts": _named(run.starts, "after step"),
        "stalls": _named(run.stalls, "step"),
        "steps not applied": _named(run.bad_steps, "step"),
        "hangs": _named([hang.step for hang in run.hangs], "step"),
        "stacks": _named(run.stacks, "rank"),
        "checkpoints": _named(run.checkpoints, "step"),
    }


def runs_table(runs: Sequence[RunRecord]) -> str:
    """One column for each run; below it who waited for whom in hangs, below two of them where their losses differ."""
    columns = [run_rows(run) for run in runs]
    names = [str(run.run_dir) for run in runs]
    labels = _joined_labels(columns)
    text = [
        ["run", *names],
        *([label, *(column.get(label, _absent(label, column)) for column in columns)] for label in labels),
    ]
    lines = text_table(None, text, align="<")
    prefixes = [f"{name}: " if len(runs) == 2 else "" for name in names]
    lines += [f"{prefix}{hang}" for prefix, run in zip(prefixes, runs, strict=True) for hang in run.hangs]
    if len(runs) == 2:
        width = max(len(row[0]) for row in text)
        lines.append(f"{'losses':<{width}}  {_loss_difference(*runs)}")
    return "".join(f"{line}\n" for line in lines)


def stragglers(lines: Sequence[Line]) -> str:
    """Ranks that the others waited for, by what they cost, and which of them are slow again and again."""
    measured = [line for line in lines if line.get("comm_wait_s_max") is not None]
    if not measured:
        return _NOT_RECORDED
    lost: dict[int, list[float]] = defaultdict(list)
    for line in measured:
        if line["straggler"] is not None:
            lost[line["straggler"]].append(line["straggler_s"])
    slow = _slow_ranks(measured)
    ranked = sorted(lost.items(), key=lambda item: -sum(item[1]))
    shown = [
        f"rank {rank} in {len(each)} of {len(measured)} steps, {sum(each):.1f} s{slow.get(rank, '')}"
        for rank, each in ranked[:_SHOWN_NUMBERS]
    ]
    more = len(ranked) - len(shown)
    return "; ".join(shown + ([f"{more} more ranks"] if more else [])) or "none"


def _slow_ranks(lines: Sequence[Line]) -> dict[int, str]:
    """Text about each rank that the log of a run without restarts would have named, by rank."""
    finder = SlowRankFinder()
    found = [slow for line in lines if (slow := finder.after_step(line))]
    return {each.rank: f" (slow, noticed in steps {each.from_step} to {each.to_step})" for each in found}


def _loss(lines: Sequence[Line]) -> str:
    known = [(line["loss"], line["step"]) for line in lines if line["loss"] is not None]
    if not known:
        return "none"
    lowest, step = min(known)
    return f"{_ends([loss for loss, _ in known])}, lowest {lowest:.4f} at step {step}"


def _losses_by_source(lines: Sequence[Line]) -> dict[str, str]:
    """A row for each data set, those that weigh most first."""
    losses: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, float] = defaultdict(float)
    for line in lines:
        for name, loss in line.get("loss_by_source", {}).items():
            if loss is not None:
                losses[name].append(loss)
                weights[name] += line["weight_by_source"][name] or 0.0
    total, ranked = sum(weights.values()), sorted(losses, key=lambda name: -weights[name])
    found = {
        f"  of {name}": f"{_ends(losses[name])}, {_percent(weights[name] / total)} of weight, "
        f"{len(losses[name])} of {len(lines)} steps"
        for name in ranked[:_SHOWN_SOURCES]
    }
    if more := len(ranked) - len(found):
        found["  others"] = f"{more} more data set{'s' if more > 1 else ''}, in metrics.jsonl"
    return found


def _asked(lines: Sequence[Line]) -> dict[str, str]:
    """A row for the answers to held-out questions, if any were asked."""
    found = [line for line in lines if line.get("retrieval_accuracy") is not None]
    if not found:
        return {}
    first, last = found[0]["retrieval_accuracy"], found[-1]["retrieval_accuracy"]
    best = max(found, key=lambda line: line["retrieval_accuracy"])
    return {
        "held-out answers right": f"{_percent(first)} to {_percent(last)} in {len(found)} evaluations, best "
        f"{_percent(best['retrieval_accuracy'])} at step {best['step']}"
    }


def _held_out(lines: Sequence[Line]) -> dict[str, str]:
    """A row for the loss of held-out data, if it was measured, and one for each of its ranges of length."""
    measured = [line for line in lines if line.get("validation_loss") is not None]
    if not measured:
        return {}
    lowest = min(measured, key=lambda line: line["validation_loss"])
    first, last = measured[0], measured[-1]
    found = {
        "held-out loss": f"{first['validation_loss']:.4f} to {last['validation_loss']:.4f} in {len(measured)} "
        f"validations, lowest {lowest['validation_loss']:.4f} at step {lowest['step']}"
    }
    for kind in ("source", "length"):
        for name, value in last[f"validation_loss_by_{kind}"].items():
            begin = first[f"validation_loss_by_{kind}"].get(name)
            if value is not None and begin is not None:
                found[f"  held-out, {name.replace('_', ' ')}"] = f"{begin:.4f} to {value:.4f}"
    return found


def _tokens(lines: Sequence[Line]) -> str:
    total = sum(line["tokens"] for line in lines)
    shares = [
        f"{_percent(sum(line[f'{kind}_tokens'] for line in lines) / total)} {kind}"
        for kind in ("visual", "supervised")
        if all(f"{kind}_tokens" in line for line in lines)
    ]
    return ", ".join([f"{total:,}", *shares])


def _rates(lines: Sequence[Line]) -> str:
    kinds = {"tokens_per_s": "", "visual_tokens_per_s": " visual", "supervised_tokens_per_s": " supervised"}
    medians = {label: _median(lines, key) for key, label in kinds.items()}
    return ", ".join(f"{value:,.0f}{label}" for label, value in medians.items() if value is not None)


def _flops(lines: Sequence[Line]) -> str:
    causal, full = _median(lines, "tflops_per_rank"), _median(lines, "tflops_per_rank_full_attention")
    if causal is None or full is None:
        return _NOT_RECORDED
    text = f"{causal:.3g}, with all pairs {full:.3g}"
    mfu, full_mfu = _median(lines, "mfu"), _median(lines, "mfu_full_attention")
    return (
        text if mfu is None or full_mfu is None else f"{text}; MFU {_percent(mfu)} and {_percent(full_mfu)}"
    )


def _packs(lines: Sequence[Line]) -> str:
    if any("padding_share" not in line for line in lines):
        return _NOT_RECORDED
    padding = statistics.mean(line["padding_share"] for line in lines)
    imbalance = statistics.mean(line["imbalance"] for line in lines)
    tiles = max(line["max_tiles_per_rank"] for line in lines)
    return f"{_percent(padding)} padding, imbalance {imbalance:.3f}, at most {tiles} tiles a rank"


def _positions(lines: Sequence[Line]) -> str:
    if any("max_position" not in line for line in lines):
        return _NOT_RECORDED
    strides = [line["stride_min"] for line in lines if line["stride_max"]]
    drawn = (
        f"strides {min(strides)} to {max(line['stride_max'] for line in lines)}" if strides else "no image"
    )
    return f"to {max(line['max_position'] for line in lines):,}, {drawn}"


def _memory(lines: Sequence[Line]) -> str:
    most = max(lines, key=lambda line: line.get("peak_mem_gib") or 0.0)
    if most.get("peak_mem_gib") is None:
        return _NOT_RECORDED
    text = f"at most {most['peak_mem_gib']:.1f} GiB"
    text += f" (rank {most['peak_mem_rank']})" if "peak_mem_rank" in most else ""
    reserved = [line["reserved_mem_gib"] for line in lines if line.get("reserved_mem_gib") is not None]
    return f"{text}, {max(reserved):.1f} GiB reserved" if reserved else text


def _time(lines: Sequence[Line]) -> str:
    data = sum(line["data_s"] for line in lines)
    seconds = data + sum(line["step_s"] for line in lines)
    text = f"{seconds:,.1f} s, {_percent(data / seconds)} waiting for data"
    measured = [line for line in lines if line.get("comm_wait_s_max") is not None]
    if not measured:
        return text
    wall = sum(line["data_s"] + line["step_s"] for line in measured)
    least, most = (sum(line[f"comm_wait_s_{end}"] for line in measured) / wall for end in ("min", "max"))
    return f"{text}, {_percent(least)} to {_percent(most)} in communication"


def _saves(lines: Sequence[Line]) -> str:
    measured = [line for line in lines if "save_s" in line]
    if not measured:
        return _NOT_RECORDED
    blocked = sum(line["save_s"] for line in measured)
    wall = blocked + sum(line["data_s"] + line["step_s"] for line in measured)
    return f"{blocked:,.1f} s, {_percent(blocked / wall)} of the time; without the last save"


def _absent(label: str, column: dict[str, str]) -> str:
    """What a run has in a row that only the other one has: a data set may be among those that are not shown."""
    return "among others" if label.startswith("  of ") and "  others" in column else "none"


def _joined_labels(columns: Sequence[dict[str, str]]) -> list[str]:
    """Labels of all columns in order; those that only a later one has follow the same neighbour."""
    labels = list(columns[0])
    for column in columns[1:]:
        place = 0
        for label in column:
            if label not in labels:
                labels.insert(place, label)
            place = labels.index(label) + 1
    return labels


def _loss_difference(first: RunRecord, second: RunRecord) -> str:
    """Whether the losses of steps that both runs have are equal, and where and by how much they differ."""
    other = {line["step"]: line["loss"] for line in second.lines}
    both = [
        (line["step"], line["loss"], other[line["step"]]) for line in first.lines if line["step"] in other
    ]
    if not both:
        return "no step is in both runs"
    apart = [(step, mine, its) for step, mine, its in both if mine != its]
    if not apart:
        return f"equal to the bit at all {len(both)} steps of both"
    gaps = [abs(mine - its) for _, mine, its in apart if mine is not None and its is not None]
    largest = f"; largest difference {max(gaps):.3g}" if gaps else ""
    return f"differ at {len(apart)} of {len(both)} steps, first at step {apart[0][0]}{largest}"


def _ends(values: Sequence[float]) -> str:
    count = max(1, len(values) // 10)
    return f"{statistics.mean(values[:count]):.4f} -> {statistics.mean(values[-count:]):.4f}"


def _median(lines: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return statistics.median(values) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _named(numbers: Sequence[int], what: str) -> str:
    if not numbers:
        return "none"
    more = f" and {len(numbers) - _SHOWN_NUMBERS} more" if len(numbers) > _SHOWN_NUMBERS else ""
    return f"{len(numbers)}: {what} {', '.join(map(str, numbers[:_SHOWN_NUMBERS]))}{more}"
