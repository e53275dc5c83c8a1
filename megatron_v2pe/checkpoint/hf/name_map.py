"""The tables of `config.families`, filled in for one architecture and inverted by code: names, shapes, transforms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from megatron_v2pe.checkpoint.hf.pyramid_table import branch_tables, interaction_rules, readout_rules
from megatron_v2pe.checkpoint.hf.tables import Spelling, spelling_of, tables, transform_of, vision_rules
from megatron_v2pe.checkpoint.hf.transforms import Transform
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.families.rules import Rule
from megatron_v2pe.config.arch.native import FolderFormat
from megatron_v2pe.core.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """A rule with its layer number filled in: the tensors of one parameter of ours.

    Attributes:
        hf: Hugging Face names, in the order of the arguments of the transform.
        ours: our name.
        hf_shapes: shape of each Hugging Face tensor.
        transform: between the two.
    """

    hf: tuple[str, ...]
    ours: str
    hf_shapes: tuple[tuple[int, ...], ...]
    transform: Transform

    def to_hf(self, stored: Tensor) -> list[Tensor]:
        """The Hugging Face tensors of a stored one, without padding.

        Rows and columns that a run added (vocabulary, heads of a split vision tower) come after the real ones.
        """
        if len(self.hf) == 1:
            stored = stored[tuple(slice(size) for size in self.hf_shapes[0])]
        return self.transform.to_hf(stored)


@dataclass(frozen=True)
class NameMap:
    """The table of one architecture.

    Attributes:
        by_ours: our parameter name -> its entry.
        by_hf: Hugging Face tensor name -> the entry it is a part of.
        dropped: pattern of Hugging Face names that are left out -> why.
    """

    by_ours: dict[str, Entry]
    by_hf: dict[str, Entry]
    dropped: dict[re.Pattern[str], str] = field(default_factory=dict)

    def hf_shape(self, hf_name: str) -> tuple[int, ...]:
        """Shape that the architecture gives to a Hugging Face tensor."""
        entry = self.by_hf[hf_name]
        return entry.hf_shapes[entry.hf.index(hf_name)]

    @property
    def num_parameters(self) -> int:
        """Elements of all Hugging Face tensors that are kept."""
        return sum(prod(shape) for entry in self.by_ours.values() for shape in entry.hf_shapes)

    def drop_reason(self, hf_name: str) -> str:
        """Why a tensor is left out; empty when it is not."""
        return next((why for pattern, why in self.dropped.items() if pattern.fullmatch(hf_name)), "")


def family_name(arch: InternVLArchitecture) -> str:
    """Language and vision family as one name, for reports and `checkpoint.json`."""
    vision = "vit300m" if arch.vision.norm_type == "layer_norm" else "vit6b"
    return f"{arch.language.architecture.removesuffix('ForCausalLM').lower()}_{vision}"


def name_map(arch: InternVLArchitecture, spelling: Spelling | None = None) -> NameMap:
    """Fill in the tables for an architecture.

    Args:
        arch: from a config.json.
        spelling: of the Hugging Face names; None is that of published folders of the config's format.
    """
    sizes = _sizes(arch)
    entries: list[Entry] = []
    dropped: dict[re.Pattern[str], str] = {}
    for rules, num_layers in tables(arch, spelling or spelling_of(arch)):
        for rule in rules:
            if rule.reason:
                patterns = (re.escape(name).replace(r"\{i\}", r"\d+") for name in rule.hf)
                dropped.update({re.compile(pattern): rule.reason for pattern in patterns})
            else:
                places = _places(rule, num_layers, arch)
                entries.extend(_expand(rule, places, sizes, transform_of(rule, arch)))
    entries.extend(pyramid_entries(arch))
    entries.extend(readout_entries(arch))
    by_hf = {name: entry for entry in entries for name in entry.hf}
    return NameMap(by_ours={entry.ours: entry for entry in entries}, by_hf=by_hf, dropped=dropped)


def pyramid_entries(arch: InternVLArchitecture, *, returns_all: bool = False) -> Iterator[Entry]:
    """Entries of the smaller branches and interactions of a PIIP tower; see `interaction_rules`."""
    for own, rules in branch_tables(arch):
        yield from _vision_entries(own, rules)
    for rule in interaction_rules(arch, returns_all=returns_all):
        yield from _expand(rule, [{}], {}, transform_of(rule, arch))


def readout_entries(arch: InternVLArchitecture) -> Iterator[Entry]:
    """Entries of LLaVA's readout of a pyramid, none where InternVL's projector is."""
    for rule in readout_rules(arch):
        yield from _expand(rule, [{}], {}, transform_of(rule, arch))


def vision_entries(arch: InternVLArchitecture, *, returns_all: bool = False) -> dict[str, Entry]:
    """Entries of the vision tower alone, by our names; Hugging Face's are GitHub's."""
    entries = [*_vision_entries(arch, vision_rules(arch)), *pyramid_entries(arch, returns_all=returns_all)]
    return {entry.ours: entry for entry in entries}


def _vision_entries(arch: InternVLArchitecture, rules: Iterable[Rule]) -> Iterator[Entry]:
    sizes = _sizes(arch)
    for rule in rules:
        places = _places(rule, arch.vision.num_layers, arch)
        yield from _expand(rule, places, sizes, transform_of(rule, arch))


def other_names(arch: InternVLArchitecture) -> NameMap:
    """The names table of the Hugging Face format that a folder does not have.

    Raises:
        CheckpointError: a pyramid, which no other format can hold.
    """
    if arch.pyramid is not None:
        raise CheckpointError(
            "this model has a pyramid around its vision tower (PIIP), which only this package's own folders hold; the "
            "native format would load as the plain model without a word. Keep the format (github)"
        )
    other: FolderFormat = "hf-native" if arch.folder_format == "github" else "github"
    return name_map(replace(arch, folder_format=other))


def _places(rule: Rule, num_layers: int, arch: InternVLArchitecture) -> list[dict[str, int]]:
    """Values of `{i}` and `{e}` for which there is a parameter."""
    if "{i}" not in rule.ours:
        return [{}]
    experts = arch.language.experts
    is_sparse = experts.is_sparse if experts and rule.layers != "all" else (False,) * num_layers
    wanted = [i for i in range(num_layers) if is_sparse[i] == (rule.layers == "sparse")]
    if experts is None or "{e}" not in rule.ours:
        return [{"i": i} for i in wanted]
    return [{"i": i, "e": e} for i in wanted for e in range(experts.num_experts)]


def _sizes(arch: InternVLArchitecture) -> dict[str, int]:
    vision, language = arch.vision, arch.language
    return {
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "M": vision.ffn_size,
        "P": vision.num_positions,
        "S": vision.patch_size,
        "K": arch.projector_width,
        "H": language.hidden_size,
        "F": language.ffn_size,
        "2F": 2 * language.ffn_size,
        "A": language.num_heads * language.head_dim,
        "B": language.num_kv_heads * language.head_dim,
        "QKV": (language.num_heads + 2 * language.num_kv_heads) * language.head_dim,
        "N": language.num_heads,
        "D": language.head_dim,
        "V": language.vocab_size,
        "E": language.experts.num_experts if language.experts else 0,
        "I": language.experts.ffn_size if language.experts else 0,
        "2I": 2 * language.experts.ffn_size if language.experts else 0,
    }


def _expand(
    rule: Rule, places: Iterable[dict[str, int]], sizes: dict[str, int], transform: Transform
) -> Iterable[Entry]:
    shapes = [
        tuple(sizes[size] if size in sizes else int(size) for size in shape.split())
        for shape in rule.shape.split("|")
    ]
    if len(shapes) == 1:
        shapes *= len(rule.hf)
    for place in places:
        names = tuple(name.format(**place) for name in rule.hf)
        yield Entry(hf=names, ours=rule.ours.format(**place), hf_shapes=tuple(shapes), transform=transform)
