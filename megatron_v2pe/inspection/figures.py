"""What all pictures share: matplotlib without a display, and figures written whole or not at all.

matplotlib is imported when a picture is drawn: it belongs to the extra `eval`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic

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
    """Write a figure as PNG, whole or not at all, and close it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    pyplot().close(figure)
    write_atomic(path, content.getvalue())
