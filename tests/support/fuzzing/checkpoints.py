"""Checkpoints of this package, changed, with hashes that agree or not, and opened as train and export-hf do."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from tests.support.fuzzing.mutations import change_any, change_json

_GOLDEN = Path(__file__).parents[2] / "golden" / "ckpt" / "a_internlm2_vit300m"


class Fuzzer:
    """See the package."""

    modules = ("megatron_v2pe.checkpoint.convert.export_hf", "megatron_v2pe.checkpoint.convert.import_hf")

    def prepare(self, root: Path) -> None:
        """An imported checkpoint."""
        from megatron_v2pe.checkpoint.convert.import_hf import import_hf

        import_hf(_GOLDEN, root / "ckpt")

    def mutate(self, root: Path, folder: Path, generator: random.Random) -> str:
        """A file, mostly a small one; in two of three cases checkpoint.json is written to agree with it."""
        target = folder / "ckpt"
        shutil.copytree(root / "ckpt", target, copy_function=shutil.copyfile)
        small = [target / "state" / name for name in (".metadata", "common.pt", "metadata.json")]
        small += [target / "hf" / name for name in ("config.json", "weights_layout.json")]
        everything = sorted(path for path in target.rglob("*") if path.is_file())
        path = generator.choice(small if generator.random() < 0.7 else everything)
        change = change_any(path, generator)
        agrees = path.name != "checkpoint.json" and generator.random() < 0.66
        if path.name == "checkpoint.json" and generator.random() < 0.5 and path.is_file():
            change += _signed(path, generator)
        elif agrees:
            _agree(target)
        return f"{path.parent.name}/{change}{', hashes agree' if agrees else ''}"

    def run(self, folder: Path) -> None:
        """Read as train, verify and export-hf do."""
        import torch

        from megatron_v2pe.checkpoint.convert.export_hf import export_hf
        from megatron_v2pe.checkpoint.files.folder import read_info, state_path
        from megatron_v2pe.checkpoint.state.load import load_state
        from megatron_v2pe.checkpoint.state.reader import StateReader

        checkpoint = folder / "ckpt"
        read_info(checkpoint)
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        tensors = dict(list(StateReader(state_path(checkpoint)).tensors.items())[:4])
        request = {
            key: ShardedTensor.from_rank_offsets(key, torch.empty(info.shape, dtype=info.dtype))
            for key, info in tensors.items()
            if info.num_bytes < 2**24
        }
        load_state(state_path(checkpoint), request)
        export_hf(checkpoint, folder / "out")


def _signed(path: Path, generator: random.Random) -> str:
    """Another change of checkpoint.json, whose own hash is then right."""
    from megatron_v2pe.checkpoint.files.hashing import digest_of

    try:
        change = change_json(path, generator)
        values = json.loads(path.read_text())
        values.pop("sha256_of_this", None)
        path.write_text(json.dumps({**values, "sha256_of_this": digest_of(values)}))
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        return ""
    return f"; {change}, signed"


def _agree(checkpoint: Path) -> None:
    """Sizes and hashes of what is there now."""
    from megatron_v2pe.checkpoint.files.hashing import digest_of, record_files

    path = checkpoint / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256_of_this"]
    files = [each for each in checkpoint.rglob("*") if each != path and _is_plain(each)]
    values["files"] = {
        name: {"num_bytes": record.num_bytes, "sha256": record.sha256, "sample": record.sample}
        for name, record in record_files(checkpoint, files).items()
    }
    path.write_text(json.dumps({**values, "sha256_of_this": digest_of(values)}))


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and not os.path.ismount(path)
