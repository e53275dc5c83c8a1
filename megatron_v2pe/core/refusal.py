"""A mistake of the user's ends a launch at once and is reported once, although torchrun starts failed ranks again.

    first start     mistake --refuse--> FOLDER_OF_THE_LAUNCH/mistake, exit code 2
    next starts     the file is there --was_refused--> exit code 2 before anything is imported

torchrun starts its ranks again whatever their exit code was, and hands nothing from one start to the next but a folder
of its own for each launch (on each node), in which it wants the errors of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_v2pe.core.env import launch_folder
from megatron_v2pe.core.files import write_atomic

_MARK = "mistake"


def was_refused(environ: Mapping[str, str] | None = None) -> bool:
    """Whether an earlier start of this launch ended with a mistake that would come again."""
    folder = launch_folder(environ)
    return folder is not None and (folder / _MARK).exists()


def refuse(message: str, environ: Mapping[str, str] | None = None) -> bool:
    """Record the mistake for the next starts of this launch; without torchrun there are none.

    Returns:
        Whether it is to be reported; False when another rank of this node has reported the same.

    Raises:
        OSError: torchrun's folder cannot be written.
    """
    folder = launch_folder(environ)
    if folder is None:
        return True
    mark = folder / _MARK
    if mark.exists() and mark.read_text(encoding="utf-8") == message:
        return False
    write_atomic(mark, message)
    return True
