"""Hugging Face folders, changed, and imported."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

from tests.support.fuzzing.mutations import ODD_VALUES, change_any, change_bytes, change_json

_GOLDEN = Path(__file__).parents[2] / "golden" / "ckpt"
_SOURCES = ("a_internlm2_vit300m", "c_qwen2_vit300m", "e_phi3_vit300m")


class Fuzzer:
    """See the package."""

    modules = ("megatron_v2pe.checkpoint.convert.import_hf",)

    def prepare(self, root: Path) -> None:
        """Copies of the golden folders."""
        for name in _SOURCES:
            shutil.copytree(_GOLDEN / name, root / name, copy_function=shutil.copyfile)

    def mutate(self, root: Path, folder: Path, generator: random.Random) -> str:
        """config.json, the header of the weights, or any file."""
        name = generator.choice(_SOURCES)
        target = folder / "hf"
        shutil.copytree(root / name, target, copy_function=shutil.copyfile)
        chance = generator.random()
        if chance < 0.5:
            path = target / "config.json"
            change = change_json(path, generator) if chance < 0.45 else change_bytes(path, generator)
        elif chance < 0.75:
            change = _change_header(target / "model.safetensors", generator)
        else:
            change = change_any(generator.choice(sorted(target.iterdir())), generator)
        return f"{name}: {change}"

    def run(self, folder: Path) -> None:
        """Import, which must leave no files when it refuses."""
        from megatron_v2pe.checkpoint.convert.import_hf import import_hf
        from megatron_v2pe.core.errors import V2PEError

        try:
            import_hf(folder / "hf", folder / "ckpt")
        except V2PEError:
            assert not list(folder.glob("ckpt*")), "something was left at the target"
            raise


def _change_header(path: Path, generator: random.Random) -> str:
    """One entry of a safetensors header, or its length."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = generator.choice(sorted(header))
    action = generator.choice(("dtype", "shape", "offsets", "entry", "name", "length", "relabel"))
    entry = header[name]
    if action == "length":
        new = generator.choice((0, 1, length - 1, length + 8, 2**63, 2**40, len(data)))
        path.write_bytes(struct.pack("<Q", new) + data[8:])
        return f"header of {new} bytes"
    if action == "relabel" and "dtype" in entry:
        entry["dtype"] = {"F32": "I32", "BF16": "F16"}.get(entry["dtype"], "U8")
    elif action == "name":
        header[generator.choice(("x", "", "module." + name, "\0"))] = header.pop(name)
    elif action == "entry":
        header[name] = generator.choice(ODD_VALUES)
    else:
        key = {"dtype": "dtype", "shape": "shape", "offsets": "data_offsets", "relabel": "dtype"}[action]
        entry[key] = generator.choice((*ODD_VALUES, [-1, 4], [2**40, 2**40], [1.5, 2], ["1", "2"]))
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header: {action} of {name}"
