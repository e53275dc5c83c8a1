"""Files that try to run code when they are opened, in checkpoints whose hashes agree with them."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torch

from megatron_v2pe.checkpoint.files.folder import write_info


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def trap_metadata(checkpoint: Path, marker: Path) -> None:
    """`.metadata` that reads as before, and runs code on the way."""
    path = checkpoint / "state" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = {"x": Trap(marker)}
    path.write_bytes(pickle.dumps(metadata))


def trap_common(checkpoint: Path, marker: Path) -> None:
    """`common.pt` with an object that runs code."""
    path = checkpoint / "state" / "common.pt"
    values = torch.load(path, weights_only=False)
    stream = io.BytesIO()
    torch.save({**values, "x": Trap(marker)}, stream)
    path.write_bytes(stream.getvalue())


def seal(checkpoint: Path) -> None:
    """Write `checkpoint.json` anew, so that every hash is right."""
    info = read_info_unchecked(checkpoint)
    (checkpoint / "checkpoint.json").unlink()
    write_info(checkpoint, replace(info, files={}))


def read_info_unchecked(checkpoint: Path):
    """Contents of `checkpoint.json`, whatever the other files are now."""
    from megatron_v2pe.checkpoint.files import folder

    return folder._parsed_info(checkpoint)
