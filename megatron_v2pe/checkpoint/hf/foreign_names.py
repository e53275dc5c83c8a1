"""Folders whose tensors have names of another program, recognised by pattern, with the way out.

A folder that was saved in the middle of something (adapters not merged, a wrapper around the model, a quantised copy)
differs in nearly every name. One sentence about what it is helps; a list of all names does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.checkpoint.hf.tables import Spelling
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.native import GITHUB_TYPE, NATIVE_TYPE, FolderFormat

_WRAPPERS = {
    "module.": "DDP or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
}
_LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)(\.|$)")
_QUANTISED = re.compile(r"\.(qweight|qzeros|SCB|absmax|quant_map|weight_scale_inv|weight_scale)$")
_MOST_PARTS = 3
_ENOUGH = 0.5  # of the expected names


def foreign_names(found: Collection[str], expected: Collection[str]) -> str:
    """What a folder with these names is, as one sentence with the way out; empty when nothing is recognised.

    Args:
        found: names of the tensors.
        expected: names that the architecture has.
    """
    adapters = [name for name in found if _LORA.search(name)]
    if adapters:
        return (
            f"{len(adapters)} of {len(found)} tensors are LoRA adapters that were not merged into their base "
            f"({adapters[0]}, ...); merge them first, with tools/merge_lora.py of InternVL or merge_and_unload() of "
            "PEFT, and import the result. A PEFT folder (adapter_config.json) is imported with --base CHECKPOINT"
        )
    quantised = [name for name in found if _QUANTISED.search(name)]
    if quantised:
        return (
            f"{len(quantised)} of {len(found)} tensors are parts of quantised weights ({quantised[0]}, ...); import "
            "the folder that was quantised, in its own dtype"
        )
    return _wrapped(found, set(expected))


_FORMATS: dict[Spelling, tuple[FolderFormat, str]] = {
    "github": ("github", f"GitHub folders (model_type {GITHUB_TYPE!r})"),
    "hf-native": ("hf-native", f"native folders (model_type {NATIVE_TYPE!r})"),
    "hf-native-nested": (
        "hf-native",
        f"native folders (model_type {NATIVE_TYPE!r}) that transformers 5 wrote",
    ),
}


def mixed_formats(
    found: Collection[str], expected: Collection[str], arch: InternVLArchitecture, spelling: Spelling
) -> str:
    """A folder with names of another format than its config.json, or of several, as one sentence; empty for neither.

    Args:
        found: names of the tensors.
        expected: names that the architecture has in the folder's own spelling.
        arch: from config.json.
        spelling: of `expected`.
    """
    if arch.pyramid is not None:  # in GitHub folders only
        return ""
    strange: dict[Spelling, list[str]] = {}
    # Both formats name most of a language model alike, so the format of config.json is asked first.
    for other in sorted(_FORMATS, key=lambda each: _FORMATS[each][0] != arch.folder_format):
        if other != spelling:
            names = name_map(replace(arch, folder_format=_FORMATS[other][0]), other).by_hf
            strange[other] = [name for name in found if name in names and name not in expected]
    other = max(strange, key=lambda each: len(strange[each]))
    if not strange[other]:
        return ""
    own = sum(name in expected for name in found)
    return (
        f"{len(strange[other])} of {len(found)} tensors have names of {_FORMATS[other][1]} ({strange[other][0]}, ...), "
        f"but config.json is that of {_FORMATS[spelling][1]}, and {own} have the names of those: two formats in one "
        "folder. Keep the config.json, the weights and the index of one of them"
    )


def _wrapped(found: Collection[str], expected: set[str]) -> str:
    """Names that are all right but for what is in front of, or within, each."""
    known = len(expected & set(found))
    if known == len(expected):
        return ""
    best, count, way = "", 0, ""
    for prefix in [*_WRAPPERS, *_common_prefixes(found)]:
        for call, changed in (
            (f"removeprefix({prefix!r})", [name.removeprefix(prefix) for name in found]),
            (f"replace({prefix!r}, '')", [name.replace(prefix, "") for name in found]),
        ):
            hits = sum(name in expected for name in changed)
            best, count, way = (prefix, hits, call) if hits > count else (best, count, way)
    if count < max(_ENOUGH * len(expected), known + 1):
        return ""
    origin = f" (as {_WRAPPERS[best]} saves them)" if best in _WRAPPERS else ""
    return (
        f"{count - known} of {len(found)} names have {best!r} in front of, or within, what they should "
        f"be{origin}; take it out and save "
        f"the folder again: save_file({{name.{way}: t for name, t in load_file(f).items()}}, f, "
        "metadata={'format': 'pt'}) of safetensors.torch"
    )


def _common_prefixes(found: Collection[str]) -> list[str]:
    """First parts of names that most names share: one part, two and three."""
    prefixes = []
    for depth in range(1, _MOST_PARTS + 1):
        parts = Counter(".".join(name.split(".")[:depth]) + "." for name in found if name.count(".") >= depth)
        prefixes += [part for part, count in parts.most_common(2) if count >= _ENOUGH * len(found)]
    return prefixes
