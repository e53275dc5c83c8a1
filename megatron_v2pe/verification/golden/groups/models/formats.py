"""The two Hugging Face formats of a golden folder: names, bits of every tensor, and the ways between them.

ckpt/<key> (GitHub)  <--convert-hf-->  ckpt_hf/<key> (native)      --import-hf, export-hf--> back, byte for byte
names.json: the recorded names of both, against our tables
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.convert.other_format import convert_hf
from megatron_v2pe.checkpoint.hf.name_map import NameMap, name_map, other_names
from megatron_v2pe.checkpoint.hf.tables import Spelling
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.verification.golden.rows import Row, equal, unsupported

_NATIVE_SPELLINGS: tuple[Spelling, ...] = ("hf-native", "hf-native-nested")


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every checkpoint that the folder holds in both formats."""
    recorded = folder / "names.json"
    table = json.loads(recorded.read_text(encoding="utf-8")) if recorded.is_file() else None
    for native in sorted((folder / "ckpt_hf").glob("*/")):
        key, github = native.name, folder / "ckpt" / native.name
        if not key.startswith(family or "") or not github.is_dir():
            continue
        try:
            read_architecture(github)
        except CheckpointError as error:
            yield unsupported(f"formats/{key}", "all", reason=str(error).splitlines()[0])
            continue
        yield from _weight_rows(f"formats/{key}", github, native)
        path = folder / "forward" / f"{key}.json"
        if table is not None and path.is_file():
            language = json.loads(path.read_text(encoding="utf-8"))["family"]
            yield _name_row(f"formats/{key}", github, table, language=language)


def _weight_rows(name: str, github: Path, native: Path) -> Iterator[Row]:
    """Conversion either way against the other folder, and every way back."""
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        there, back, again = (Path(scratch) / each for each in ("native", "github", "again"))
        convert_hf(github, there)
        yield _same_tensors(name, "github to native", there, native)
        convert_hf(native, back)
        if _language(back) == _language(github):
            yield _same_tensors(name, "native to github", back, github)
        else:  # InternLM2 is a llama in native folders, and a folder that says no more stays one
            convert_hf(back, again)
            yield _same_tensors(name, "native, github, native", again, native)
    for quantity, source in (("github, ours, github", github), ("native, ours, native", native)):
        with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
            import_hf(source, Path(scratch) / "ours")
            export_hf(Path(scratch) / "ours", Path(scratch) / "back")
            yield _same_files(name, quantity, Path(scratch) / "back", source)
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        first, other, second, last = (Path(scratch) / each for each in ("1", "native", "2", "github"))
        import_hf(github, first)
        export_hf(first, other, to="hf-native")
        import_hf(other, second)
        export_hf(second, last, to="github")
        yield _same_tensors(name, "github, ours, native, ours, github", last, github)


def _language(folder: Path) -> str:
    return read_architecture(folder).language.architecture


def _same_tensors(name: str, quantity: str, found: Path, wanted: Path) -> Row:
    """Same names but for the two native spellings, same dtypes, same bits."""
    ours, theirs = HFWeights(found), HFWeights(wanted)
    spelled = _published_names(found, ours.tensors)
    other = _published_names(wanted, theirs.tensors)
    missing = sorted(spelled.keys() ^ other.keys())
    detail = f"on one side only: {', '.join(missing[:3])}" if missing else ""
    if not detail:
        changed = [key for key in spelled if not _same_bits(ours, spelled[key], theirs, other[key])]
        detail = f"{len(changed)} tensors differ, first {changed[0]}" if changed else ""
    return equal(name, quantity, is_equal=not detail, detail=detail)


def _published_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name in published folders of the format -> name in this folder."""
    arch = read_architecture(folder)
    if arch.folder_format == "github":
        return {name: name for name in names}
    published, nested = (name_map(arch, spelling).by_ours for spelling in _NATIVE_SPELLINGS)
    plain = {
        other: name
        for ours in published
        for name, other in zip(published[ours].hf, nested[ours].hf, strict=True)
    }
    return {plain.get(name, name): name for name in names}


def _same_bits(ours: HFWeights, name: str, theirs: HFWeights, other: str) -> bool:
    """Same dtype, shape and bytes, NaN included."""
    if ours.tensors[name] != theirs.tensors[other]:
        return False
    return torch.equal(ours.read(name).view(torch.uint8), theirs.read(other).view(torch.uint8))


def _same_files(name: str, quantity: str, found: Path, wanted: Path) -> Row:
    """Same files, same bytes."""
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (found, wanted)
    )
    different = sorted(str(path) for path in ours.keys() | theirs if ours.get(path) != theirs.get(path))
    return equal(name, quantity, is_equal=not different, detail=f"differ: {', '.join(different)}")


def _name_row(name: str, github: Path, table: Mapping[str, Any], *, language: str) -> Row:
    """The names that our tables pair, parameter by parameter, against the recorded pairs."""
    arch = read_architecture(github)
    recorded = _Recorded([*table["vision"], *table["projector"], *table["language"][language]])
    wrong = [
        f"{' + '.join(entry.hf)} is {', '.join(sorted(native))}"
        for entry, native in _pairs(name_map(arch), other_names(arch))
        if recorded.native_of(entry.hf) != native
    ]
    return equal(name, "names", is_equal=not wrong, detail=f"{len(wrong)} differ: {'; '.join(wrong[:2])}")


def _pairs(github: NameMap, native: NameMap) -> Iterator[tuple[Any, set[str]]]:
    for ours, entry in github.by_ours.items():
        yield entry, set(native.by_ours[ours].hf)


class _Recorded:
    """Rows of names.json: GitHub pattern, native pattern or patterns, and what is done."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self._rows = [
            (
                re.compile(
                    re.escape(github).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
                ),
                [native] if isinstance(native, str) else native,
            )
            for github, native, _operation in rows
        ]

    def native_of(self, names: Iterable[str]) -> set[str]:
        """Native names of some GitHub names; those without a row have none."""
        found = ((pattern.fullmatch(name), natives) for name in names for pattern, natives in self._rows)
        return {native.format(**match.groupdict()) for match, natives in found if match for native in natives}
