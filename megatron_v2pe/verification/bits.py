"""`verify`: a checkpoint has exactly the weights and side files of a Hugging Face folder.

Every tensor of the folder is compared, bit for bit, with the checkpoint's after the inverse mapping, and every state
key of the checkpoint must belong to one of them; side files are compared byte for byte. `WeightsDigest` is the result
in one line: a folder, its import and the export of that import have the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_v2pe.checkpoint.convert.exported_tensors import ExportedTensors
from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.files.folder import hf_path, read_info
from megatron_v2pe.checkpoint.files.hashing import VerifyLevel
from megatron_v2pe.checkpoint.files.tensor_files import DTYPE_NAMES, tensor_bytes
from megatron_v2pe.checkpoint.files.weights_layout import LAYOUT_FILE
from megatron_v2pe.checkpoint.hf.converted_blocks import Progress, silent
from megatron_v2pe.checkpoint.hf.weight_files import side_files
from megatron_v2pe.checkpoint.hf.weights import HFWeights

_OPTIMIZER_PREFIX = "optimizer."


class WeightsDigest:
    """SHA-256 over name, dtype, shape and bytes of tensors, added in the order of their names.

    The distribution of tensors over files, and other files, do not change it.
    """

    def __init__(self) -> None:
        self._running = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor; the caller adds them in sorted order."""
        self._running.update(f"{name} {DTYPE_NAMES[tensor.dtype]} {tuple(tensor.shape)}\n".encode())
        self._running.update(tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """The hash so far, in hexadecimal."""
        return self._running.hexdigest()


def weights_sha256(names: Collection[str], read: Callable[[str], Tensor]) -> str:
    """`WeightsDigest` of tensors that are read one by one."""
    digest = WeightsDigest()
    for name in sorted(names):
        digest.add(name, read(name))
    return digest.hexdigest()


@dataclass
class VerifyReport:
    """What `verify` found. Every source tensor is equal, different or dropped; every state key known or unexpected.

    Attributes:
        num_source: tensors of the Hugging Face folder.
        num_state: model parameters of the checkpoint.
        num_equal: source tensors with equal dtype, shape and bytes in the checkpoint.
        dropped: source tensor -> why the table leaves it out.
        different: tensor -> how it differs, also when one of the two lacks it.
        unexpected: state keys that belong to no source tensor.
        side_files: file -> `differs`, `missing in the checkpoint` or `only in the checkpoint`.
        source_sha256: digest of the kept source tensors.
        checkpoint_sha256: digest of all of the checkpoint's tensors under their Hugging Face names.
    """

    num_source: int
    num_state: int
    num_equal: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    side_files: dict[str, str] = field(default_factory=dict)
    source_sha256: str = ""
    checkpoint_sha256: str = ""

    @property
    def is_equal(self) -> bool:
        """True when the checkpoint exports to the same folder, dropped tensors aside."""
        return not (self.different or self.unexpected or self.side_files)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, the verdict first."""
        return {"is_equal": self.is_equal, **asdict(self)}

    def lines(self, *, shown: int = 20) -> list[str]:
        """The report as text."""
        found = [
            f"tensors       {self.num_source} in the folder, {self.num_equal} equal, {len(self.different)} different, "
            f"{len(self.dropped)} left out",
            f"state keys    {self.num_state}, {len(self.unexpected)} of them belong to no tensor",
            f"sha256        {self.source_sha256}  folder",
            f"              {self.checkpoint_sha256}  checkpoint after the inverse mapping",
        ]
        details = [f"different     {name}: {how}" for name, how in self.different.items()]
        details += [f"unexpected    {key}" for key in self.unexpected]
        details += [f"left out      {name}: {why}" for name, why in self.dropped.items()]
        details += [f"side file     {name}: {how}" for name, how in self.side_files.items()]
        more = [f"... and {len(details) - shown} more"] if len(details) > shown else []
        return [*found, *details[:shown], *more, "equal" if self.is_equal else "NOT equal"]


def verify(
    hf_folder: str | Path,
    checkpoint_folder: str | Path,
    *,
    files: VerifyLevel = "sizes",
    progress: Progress = silent,
) -> VerifyReport:
    """Compare a Hugging Face folder with a checkpoint folder.

    Args:
        hf_folder: the source.
        checkpoint_folder: a checkpoint; a trained one differs, and the report lists where.
        files: how closely the checkpoint's own files are checked first.
        progress: called with the bytes of each block that is read.

    Raises:
        CheckpointError: one of the two cannot be read at all.
    """
    read_info(checkpoint_folder, verify=files)
    weights, _, _ = open_hf(hf_folder)
    exported = ExportedTensors(checkpoint_folder, progress=progress)
    state_keys = [key for key in exported.state.tensors if not key.startswith(_OPTIMIZER_PREFIX)]
    report = VerifyReport(num_source=len(weights.tensors), num_state=len(state_keys))
    report.unexpected = sorted(set(state_keys) - set(exported.names.by_ours))
    report.dropped = {
        name: exported.names.drop_reason(name) for name in weights.tensors if exported.names.drop_reason(name)
    }
    _compare_tensors(weights, exported, report)
    _compare_side_files(Path(hf_folder), hf_path(checkpoint_folder), report)
    return report


def _compare_tensors(weights: HFWeights, exported: ExportedTensors, report: VerifyReport) -> None:
    source_digest = WeightsDigest()
    checkpoint_digest = WeightsDigest()
    here, there = set(weights.tensors) - set(report.dropped), set(exported.names.by_hf)
    for name in sorted(here | there):
        source = weights.read(name) if name in here else None
        ours = exported.read(name) if name in there else None
        if source is not None:
            source_digest.add(name, source)
        if ours is not None:
            checkpoint_digest.add(name, ours)
        how = _difference(source, ours)
        if how:
            report.different[name] = how
        else:
            report.num_equal += 1
    report.source_sha256 = source_digest.hexdigest()
    report.checkpoint_sha256 = checkpoint_digest.hexdigest()


def _difference(source: Tensor | None, ours: Tensor | None) -> str:
    if source is None:
        return "not in the folder"
    if ours is None:
        return "the checkpoint's architecture has no such tensor"
    if source.dtype != ours.dtype:
        return f"dtype {source.dtype}, in the checkpoint {ours.dtype}"
    if source.shape != ours.shape:
        return f"shape {tuple(source.shape)}, in the checkpoint {tuple(ours.shape)}"
    if tensor_bytes(source) == tensor_bytes(ours):  # bits, so that NaN equals NaN and 0.0 is not -0.0
        return ""
    return f"largest difference {(source.double() - ours.double()).abs().max().item():.3g}"


def _compare_side_files(source: Path, stored: Path, report: VerifyReport) -> None:
    here = set(side_files(source))
    there = set(side_files(stored)) - {Path(LAYOUT_FILE)}
    report.side_files.update({str(path): "missing in the checkpoint" for path in sorted(here - there)})
    report.side_files.update({str(path): "only in the checkpoint" for path in sorted(there - here)})
    for path in sorted(here & there):
        if (source / path).read_bytes() != (stored / path).read_bytes():
            report.side_files[str(path)] = "differs"
