"""A mistake of the user's ends a launch at once and is reported once, although torchrun starts failed ranks again.

    first start     mistake --refuse--> FOLDER_OF_THE_LAUNCH/mistake, exit code 2
    next starts     the file is there --was_refused--> exit code 2 before anything is imported

torchrun starts its ranks again whatever their exit code was, and hands nothing from one start to the next but a folder
of its own for each launch (on each node), in which it wants the errors of ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from megatron_v2pe.core.env import error_file, launch_folder
from megatron_v2pe.core.files import write_atomic

_MARK = "mistake"


def was_refused(environ: Mapping[str, str] | None = None) -> bool:
    """Whether an earlier start of this launch ended with a mistake that would come again.

    torchrun gets that mistake once more: it ends with the error of its last start.
    """
    folder = launch_folder(environ)
    if folder is None or not (folder / _MARK).exists():
        return False
    report_to_torchrun((folder / _MARK).read_text(encoding="utf-8"), environ)
    return True


def report_to_torchrun(message: str, environ: Mapping[str, str] | None = None) -> None:
    """Let torchrun end its own report with this rank's error; without it the report ends with a link about tracebacks.

    What it prints around that, the traceback of its own exception among it, is not ours to change.
    """
    path = error_file(environ)
    if path is None or not path.parent.is_dir() or launch_folder(environ) is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


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
