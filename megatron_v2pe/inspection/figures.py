"""What all pictures share: matplotlib without a display, figures written whole or not at all, the loss curve.

matplotlib is imported when a picture is drawn: it belongs to the extra `eval`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import read_jsonl

_DPI = 150


def pyplot() -> Any:
    """matplotlib's plotting module, without a display; call it early to learn whether it is there.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "pictures need matplotlib, which is not installed; run  pip install 'megatron_v2pe[eval]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all, and forget it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    pyplot().close(figure)
    write_atomic(path, content.getvalue())


def write_loss_curve(path: str | Path, metrics_path: str | Path) -> None:
    """Draw loss (left) and learning rate (right) over steps of a run's `metrics.jsonl`.

    Raises:
        DataError: no such file, no step in it, or a line without step, loss and lr.
    """
    plt = pyplot()
    steps, losses, rates = _read_metrics(metrics_path)
    figure, axes = plt.subplots(figsize=(6.8, 4.3), layout="constrained")
    (raw,) = axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    (mean,) = axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=2)
    axes.set_yscale("log")
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel("loss (nats per supervised token, log scale)")
    axes.grid(alpha=0.3, which="both")
    right = axes.twinx()
    (rate,) = right.plot(steps, rates, color="tab:orange", linestyle="--", linewidth=1.2)
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0.0)
    names = ["loss", "loss, moving mean", "learning rate"]
    figure.legend([raw, mean, rate], names, loc="outside lower center", ncols=3, fontsize=9)
    axes.set_title(f"Training loss, {int(steps[-1])} steps, last {losses[-1]:.3g}", fontsize=11)
    save_figure(figure, path)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean with the start's bias taken out; about the last 10 values count."""
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        total, weight = 0.9 * total + 0.1 * value, 0.9 * weight + 0.1
        out[index] = total / weight
    return out


def _read_metrics(path: str | Path) -> tuple[NDArray[np.float64], ...]:
    """Steps, losses and learning rates, float64 each."""
    rows = []
    for number, values in read_jsonl(path):
        if values.get("is_applied") is False:  # loss or gradient was not finite
            continue
        try:
            rows.append((float(values["step"]), float(values["loss"]), float(values["lr"])))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a line of training metrics ({error!r})") from None
    if not rows:
        raise DataError(f"{path}: holds no step; did the run start?")
    steps, losses, rates = np.array(rows).T
    return steps, losses, rates
