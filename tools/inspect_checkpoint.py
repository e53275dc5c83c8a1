"""Tensors of a folder of weights, and how two folders differ.

    python tools/inspect_checkpoint.py InternVL2-2B                       names, dtypes, shapes, bytes
    python tools/inspect_checkpoint.py runs/first                         a run's newest checkpoint, with its optimizer
    python tools/inspect_checkpoint.py ckpt --filter 'language.*.weight' --stats
    python tools/inspect_checkpoint.py ckpt --hf-names --sha256           under Hugging Face names; one hash of all
    python tools/inspect_checkpoint.py InternVL2-2B out                   what differs, the largest difference of each

A folder is a Hugging Face one (config.json and safetensors), a checkpoint (of import-hf or of training), or a run.
One tensor is in memory at a time. A Hugging Face folder and a checkpoint are compared under Hugging Face names.
Exit codes: 0, and of a comparison 1 when something differs; 1 for a folder with problems; 2 for a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from convert_support.arguments import run_tool

from megatron_v2pe.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tool."""
    parser.add_argument("folder", help="Hugging Face folder, checkpoint or run")
    parser.add_argument("other", nargs="?", help="a second one, to compare with")
    parser.add_argument(
        "--filter",
        default="",
        metavar="PATTERN",
        help="names with these letters, or matching this pattern with * or ?",
    )
    parser.add_argument(
        "--stats", action="store_true", help="smallest, largest, mean, NaN and Inf of each tensor"
    )
    parser.add_argument("--hf-names", action="store_true", help="list a checkpoint under Hugging Face names")
    parser.add_argument(
        "--sha256", action="store_true", help="hash over names, dtypes, shapes and bytes of the listed"
    )
    parser.add_argument("--json", action="store_true", help="json instead of text")
    parser.add_argument(
        "--verify-checkpoint",
        choices=("sizes", "full"),
        default="sizes",
        help="check a checkpoint's files first: sizes, or all hashes (default: sizes)",
    )


def run(args: argparse.Namespace) -> int:
    """List one folder, or compare two."""
    if args.other is None:
        return _list(args)
    if args.stats or args.sha256:
        raise ConfigError("--stats and --sha256 are of one folder; omit the second folder or the option")
    return _compare(args)


def _open(args: argparse.Namespace, path: str, *, hf_names: bool) -> Any:
    from megatron_v2pe.checkpoint.listing import open_folder

    return open_folder(path, hf_names=hf_names, verify=args.verify_checkpoint)


def _names(args: argparse.Namespace, *folders: Any) -> list[str]:
    from megatron_v2pe.checkpoint.listing import matching

    everything = list(dict.fromkeys(name for folder in folders for name in folder.tensors))
    found = matching(everything, args.filter)
    if not found:
        raise ConfigError(f"--filter {args.filter!r} matches none of the {len(everything)} tensors")
    return found


def _list(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.listing import stats_of
    from megatron_v2pe.verification.bits import weights_sha256

    source = _open(args, args.folder, hf_names=args.hf_names)
    rows = []
    for name in _names(args, source):
        info = source.tensors[name]
        row = {"name": name, "dtype": _dtype(info), "shape": list(info.shape), "bytes": info.num_bytes}
        rows.append(row | (dataclasses.asdict(stats_of(source.read(name))) if args.stats else {}))
    digest = weights_sha256([row["name"] for row in rows], source.read) if args.sha256 else ""
    if args.json:
        about = dataclasses.asdict(source.info) if source.info else {}
        report = {
            "folder": str(source.folder),
            "checkpoint": about,
            "problems": source.problems,
            "tensors": rows,
        }
        print(json.dumps(report | ({"sha256": digest} if digest else {}), indent=2))
    else:
        _print_list(source, rows, digest)
    return 1 if source.problems else 0


def _print_list(source: Any, rows: list[dict[str, Any]], digest: str) -> None:
    for row in rows:
        text = f"{row['dtype']:<8} {row['shape']!s:<22} {row['bytes']:>14,}  {row['name']}"
        if "mean" in row:
            values = f"{row['minimum']:.4g} .. {row['maximum']:.4g}  mean {row['mean']:.4g}"
            text += f"  {values}  nan {row['num_nan']}  inf {row['num_inf']}"
        print(text)
    num_bytes = sum(row["bytes"] for row in rows)
    print(
        f"{source.folder}: {len(rows)} of {len(source.tensors)} tensors, {num_bytes:,} of {source.num_bytes:,} bytes"
    )
    if source.info is not None:
        info = source.info
        about = f"{info.kind}, step {info.step}, {info.family}, {info.num_parameters:,} parameters"
        layout = info.topology or info.target_layout
        print(about + (f", layout {layout}" if layout else ""))
    if digest:
        print(f"sha256 {digest}")
    for problem in source.problems:
        print(f"problem: {problem}")


def _compare(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.listing import differences

    first, second = (_open(args, path, hf_names=args.hf_names) for path in (args.folder, args.other))
    if (first.info is None) != (second.info is None):
        first, second = (_open(args, path, hf_names=True) for path in (args.folder, args.other))
    names = _names(args, first, second)
    found = list(differences(first, second, names))
    if args.json:
        rows = [dataclasses.asdict(difference) for difference in found]
        print(json.dumps({"compared": len(names), "different": rows}, indent=2))
        return 1 if found else 0
    for difference in found:
        largest = "" if difference.max_abs is None else f"  largest difference {difference.max_abs:.6g}"
        sides = f"{difference.first or '-'} | {difference.second or '-'}"
        print(f"{difference.kind:<12} {difference.name}  {sides}{largest}")
    verdict = f"{len(found)} different" if found else "equal, bit for bit"
    print(f"{len(names)} tensors of {first.folder} and {second.folder}: {verdict}")
    return 1 if found else 0


def _dtype(info: Any) -> str:
    return str(info.dtype).removeprefix("torch.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_tool(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
