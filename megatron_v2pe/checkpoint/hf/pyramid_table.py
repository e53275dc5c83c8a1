"""Smaller branches and interactions of a PIIP tower, in the folder format of docs/piip.md.

    vision_model.piip.branches.{b}.        InternViT's names and shapes, as below vision_model.
    vision_model.piip.interactions.{i}.    the PIIP release's names
    mm_projector.branch{b}.                readout `llava`, which has no mlp1: the release's names, b counted from 1

C, D: channels of the branch that is read into, and of what is read; I: channels of all heads; E: of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_v2pe.checkpoint.hf.tables import vision_rules
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.families.rules import Rule
from megatron_v2pe.config.arch.pyramid import PyramidArchitecture

PREFIX = "vision_model.piip."


def branch_tables(arch: InternVLArchitecture) -> Iterator[tuple[InternVLArchitecture, tuple[Rule, ...]]]:
    """Rules of every smaller branch, with the architecture whose vision tower it is."""
    branches = arch.pyramid.branches if arch.pyramid else ()
    for index, branch in enumerate(branches):
        own = replace(arch, vision=branch, pyramid=None, folder_format="github")
        rules = tuple(
            replace(
                rule,
                hf=tuple(name.replace("vision_model.", f"{PREFIX}branches.{index}.") for name in rule.hf),
                ours=rule.ours.replace("vision.", f"vision.branches.{index}."),
            )
            for rule in vision_rules(own)
        )
        yield own, rules


def interaction_rules(arch: InternVLArchitecture, *, returns_all: bool = False) -> tuple[Rule, ...]:
    """Rules of all interactions, none for an architecture without a pyramid.

    Args:
        arch: the architecture.
        returns_all: with the last interaction's ways into smaller branches, also where the readout never reads them.
    """
    pyramid = arch.pyramid
    if pyramid is None:
        return ()
    widths = (arch.vision.hidden_size, *(branch.hidden_size for branch in pyramid.branches))
    shapes: dict[str, str] = {}
    for index in range(pyramid.num_interactions):
        has_both = returns_all or pyramid.both_ways(index)
        for pair in range(len(pyramid.branches)):
            name = f"interactions.{index}.interaction_units_{pair + 1}{pair + 2}."
            large, small = widths[pair], widths[pair + 1]
            shapes |= _way(f"{name}branch2to1", large, small, pyramid)
            if has_both:
                shapes |= _way(f"{name}branch1to2", small, large, pyramid)
    return tuple(
        Rule((f"vision_model.piip.{name}",), f"vision.{name}", shape) for name, shape in shapes.items()
    )


READOUT = "mm_projector."
_LAST_LINEAR = {"group": 6, "layer": 5}


def readout_rules(arch: InternVLArchitecture) -> tuple[Rule, ...]:
    """Rules of LLaVA's readout, in the order of `named_parameters`; none where InternVL's projector is."""
    pyramid = arch.pyramid
    if pyramid is None or not pyramid.reads_all:
        return ()
    hidden = arch.language.hidden_size
    shapes: dict[str, str] = {}
    for number, width in enumerate(
        (arch.vision.hidden_size, *(branch.hidden_size for branch in pyramid.branches)), start=1
    ):
        own = f"branch{number}."
        shapes |= _linear(f"{own}1", hidden, width)
        if pyramid.readout_norm == "group":
            shapes |= {f"{own}3.weight": f"{hidden}", f"{own}3.bias": f"{hidden}"}
        shapes |= _linear(f"{own}{_LAST_LINEAR[pyramid.readout_norm]}", hidden, hidden)
    return tuple(
        Rule((f"{READOUT}{name}",), f"projector.merge.{name}", shape) for name, shape in shapes.items()
    )


def _way(name: str, width: int, other: int, pyramid: PyramidArchitecture) -> dict[str, str]:
    """Names and shapes of one direction of a unit: into a branch of `width` channels."""
    shapes: dict[str, str] = {}
    if pyramid.projection:
        shapes |= _linear(f"{name}_proj", width, other)
    read = width if pyramid.projection else other
    own = f"{name}_injector."
    # In the order of `named_parameters`, which decides where mcore's gradient buffer has gaps.
    shapes |= {f"{own}ca_gamma": f"{width}", f"{own}cffn_gamma": f"{width}"}
    if pyramid.attention == "deformable":
        inner, places = int(width * pyramid.value_ratio), pyramid.heads * pyramid.points
        shapes |= _linear(f"{own}attn.sampling_offsets", 2 * places, width)
        shapes |= _linear(f"{own}attn.attention_weights", places, width)
        shapes |= _linear(f"{own}attn.value_proj", inner, read)
        shapes |= _linear(f"{own}attn.output_proj", width, inner)
    else:
        shapes |= {f"{own}attn.w{key}.weight": f"{width} {read if key in 'kv' else width}" for key in "qkv"}
        shapes |= _linear(f"{own}attn.proj", width, width)
    if pyramid.norm:
        for norm, size in (("query_norm", width), ("feat_norm", read), ("ffn_norm", width)):
            shapes |= {f"{own}{norm}.weight": f"{size}", f"{own}{norm}.bias": f"{size}"}
    hidden = int(width * pyramid.ffn_ratio)
    shapes |= _linear(f"{own}ffn.fc1", hidden, width)
    shapes |= {
        f"{own}ffn.dwconv.dwconv.weight": f"{hidden} 1 3 3",
        f"{own}ffn.dwconv.dwconv.bias": f"{hidden}",
    }
    return shapes | _linear(f"{own}ffn.fc2", width, hidden)


def _linear(name: str, rows: int, columns: int) -> dict[str, str]:
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": f"{rows}"}
