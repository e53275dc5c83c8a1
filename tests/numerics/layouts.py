"""The layouts of the parity matrix: every combination of axes on 2 and 4 ranks, and what else must change no number.

Names are those of the table in docs/numerics.md. Half of the rows are sizes alone; the others add uneven
pipeline stages, recomputation, frozen parts, tied embeddings, and other ways to share a sequence.
"""

from megatron_v2pe.config.schema import ParallelConfig
from tests.support.parity import Layout, Options, Work
from tests.support.parity_cases import IMAGES, PACKINGS, POSITIONS, Case, covering_cases

ALL_TRAINED = Options()
VISION, LANGUAGE = Options(freeze_vision=True), Options(freeze_language=True)
PROJECTOR_ALONE = Options(freeze_vision=True, freeze_language=True)
LANGUAGE_ALONE = Options(freeze_vision=True, freeze_projector=True)
TIED = Options(tied=True)
OTHER = Options(other_parts=True)
EXPERTS = Options(experts=True)


def of(*, options=ALL_TRAINED, recompute="none", micro_batch_tiles=0, sp=False, layout="", **parallel):
    """A layout in few words."""
    sizes = ParallelConfig(sequence_parallel=sp, pipeline_layout=layout, **parallel)
    return Layout(sizes, options, recompute=recompute, micro_batch_tiles=micro_batch_tiles)


TWO_RANKS = {
    "tp2": of(tp=2),
    "tp2 sp": of(tp=2, sp=True),
    "pp2": of(pp=2),
    "pp2 vpp2": of(pp=2, vpp=2),
    "cp2": of(cp=2),
    "dp2": of(),
}
TWO_RANKS_OPTIONS = {
    "cp2, all_gather": of(cp=2, cp_comm_type="all_gather"),
    "cp2, a2a": of(cp=2, cp_comm_type="a2a"),
    "pp2, stages Ettt, tL": of(pp=2, layout="Ettt|tL"),
    "pp2, stages E, ttttL": of(pp=2, layout="E|ttttL"),
    "pp2 vpp2, stages Et, tt, t, L": of(pp=2, vpp=2, layout="Et|tt|t|L"),
    "pp2, full recompute, 1 tile at a time": of(pp=2, recompute="full", micro_batch_tiles=1),
    "pp2 vpp2, full recompute": of(pp=2, vpp=2, recompute="full"),
    "cp2, selective recompute, 2 tiles at a time": of(cp=2, recompute="selective", micro_batch_tiles=2),
    "tp2 sp, full recompute": of(tp=2, sp=True, recompute="full"),
    "pp2, frozen vision": of(pp=2, options=VISION),
    "pp2, frozen language": of(pp=2, options=LANGUAGE),
    "pp2, projector alone trained, full recompute": of(pp=2, options=PROJECTOR_ALONE, recompute="full"),
    "pp2 vpp2, frozen language": of(pp=2, vpp=2, options=LANGUAGE),
    "tp2 sp, frozen language": of(tp=2, sp=True, options=LANGUAGE),
    "cp2, language alone trained, full recompute": of(cp=2, options=LANGUAGE_ALONE, recompute="full"),
    "tp2 sp, tied": of(tp=2, sp=True, options=TIED),
    "pp2, tied": of(pp=2, options=TIED),
    "pp2 vpp2, tied": of(pp=2, vpp=2, options=TIED),
    "tp2, split tower": of(tp=2, vision="tensor"),
    "tp2 sp, split tower": of(tp=2, sp=True, vision="tensor"),
    "tp2 sp, other parts": of(tp=2, sp=True, options=OTHER),
    "tp2 sp, other parts, split tower": of(tp=2, sp=True, options=OTHER, vision="tensor"),
    "cp2, other parts": of(cp=2, options=OTHER),
    "pp2, other parts": of(pp=2, options=OTHER),
}
# Documents on some of the ranks: native attention with p2p.
BY_DOCUMENT = {
    "cp2, by document": of(cp=2, cp_sharding="by_document"),
    "cp2, auto, selective recompute": of(cp=2, cp_sharding="auto", recompute="selective"),
    "cp2 ep2, by document": of(cp=2, ep=2, options=EXPERTS, cp_sharding="by_document"),
}
FOUR_RANKS_BY_DOCUMENT = {
    "cp4, by document": of(cp=4, cp_sharding="by_document"),
    "tp2 sp cp2, by document": of(tp=2, sp=True, cp=2, cp_sharding="by_document"),
    "tp2 sp cp2, by document, split tower": of(
        tp=2, sp=True, cp=2, cp_sharding="by_document", vision="tensor"
    ),
    "tp2 cp2, by document": of(tp=2, cp=2, cp_sharding="by_document"),
    "pp2 cp2, by document": of(pp=2, cp=2, cp_sharding="by_document"),
    "pp2 vpp2 cp2, by document": of(pp=2, vpp=2, cp=2, cp_sharding="by_document"),
    "cp2 dp2, by document": of(cp=2, cp_sharding="by_document"),
}
TWO_RANKS_EXPERTS = {
    "ep2": of(ep=2, options=EXPERTS),
    "tp2 sp ep2": of(tp=2, sp=True, ep=2, options=EXPERTS),
    "cp2 ep2, selective recompute": of(cp=2, ep=2, options=EXPERTS, recompute="selective"),
    "tp2 sp etp2": of(tp=2, sp=True, etp=2, options=EXPERTS),
    "tp2 sp, experts": of(tp=2, sp=True, options=EXPERTS),
    "pp2, experts, full recompute": of(pp=2, options=EXPERTS, recompute="full"),
}
FOUR_RANKS_EXPERTS = {
    "pp2 ep2": of(pp=2, ep=2, options=EXPERTS),
    "pp2 vpp2 ep2, full recompute": of(pp=2, vpp=2, ep=2, options=EXPERTS, recompute="full"),
    "tp2 sp cp2 ep2": of(tp=2, sp=True, cp=2, ep=2, options=EXPERTS),
    "tp2 sp cp2 ep4": of(tp=2, sp=True, cp=2, ep=4, options=EXPERTS),
    "tp2 sp dp2 ep2 etp2": of(tp=2, sp=True, ep=2, etp=2, options=EXPERTS),
    "cp2 dp2 ep2": of(cp=2, ep=2, options=EXPERTS),
}
THREE_RANKS = {
    "cp3": of(cp=3),
    "pp3, stages Et, tt, tL": of(pp=3, layout="Et|tt|tL"),
}
FOUR_RANKS_TP = {
    "tp4": of(tp=4),
    "tp4 sp": of(tp=4, sp=True),
    "tp2 pp2": of(tp=2, pp=2),
    "tp2 sp pp2": of(tp=2, sp=True, pp=2),
    "tp2 pp2 vpp2": of(tp=2, pp=2, vpp=2),
    "tp2 sp pp2 vpp2": of(tp=2, sp=True, pp=2, vpp=2),
    "tp2 cp2": of(tp=2, cp=2),
    "tp2 sp cp2": of(tp=2, sp=True, cp=2),
    "tp2 dp2": of(tp=2),
    "tp2 sp dp2": of(tp=2, sp=True),
    "tp2 sp cp2, split tower": of(tp=2, sp=True, cp=2, vision="tensor"),
    "tp2 sp cp2, a2a": of(tp=2, sp=True, cp=2, cp_comm_type="a2a"),
}
FOUR_RANKS = {
    "pp4": of(pp=4),
    "pp4 vpp2, stages Et, t, t, t, -, -, -, L": of(pp=4, vpp=2, layout="Et|t|t|t||||L"),
    "pp2 cp2": of(pp=2, cp=2),
    "pp2 vpp2 cp2": of(pp=2, vpp=2, cp=2),
    "pp2 dp2": of(pp=2),
    "pp2 vpp2 dp2": of(pp=2, vpp=2),
    "cp4": of(cp=4),
    "cp2 dp2": of(cp=2),
    "dp4": of(),
    "pp2 cp2, projector alone trained, full recompute": of(
        pp=2, cp=2, options=PROJECTOR_ALONE, recompute="full"
    ),
}
EIGHT_RANKS = {"tp2 sp pp2 cp2": of(tp=2, sp=True, pp=2, cp=2), "tp2 pp2 cp2": of(tp=2, pp=2, cp=2)}

# Images x positions in full, packing in turn: what each layout of two ranks sees.
NINE_CASES = tuple(
    Case(PACKINGS[(i + j) % 2], images, mode)
    for i, images in enumerate(IMAGES)
    for j, mode in enumerate(POSITIONS)
)


def nine(layouts):
    """Nine cases for each layout."""
    return [Work(name, layout, NINE_CASES) for name, layout in layouts.items()]


def three(layouts):
    """Three cases for each layout; six layouts in a row have all eighteen between them."""
    return [
        Work(name, layout, covering_cases(start=number))
        for number, (name, layout) in enumerate(layouts.items())
    ]


def one(layouts):
    """One case for each layout."""
    return [
        Work(name, layout, covering_cases(start=number)[:1])
        for number, (name, layout) in enumerate(layouts.items())
    ]


GROUPS = {
    "2 ranks": (2, nine(TWO_RANKS)),
    "2 ranks, options": (2, three(TWO_RANKS_OPTIONS)),
    "2 ranks, experts": (2, one(TWO_RANKS_EXPERTS)),
    "2 ranks, by document": (2, three(BY_DOCUMENT)),
    "4 ranks, by document": (4, three(FOUR_RANKS_BY_DOCUMENT)),
    "3 ranks": (3, three(THREE_RANKS)),
    "4 ranks with tp": (4, three(FOUR_RANKS_TP)),
    "4 ranks without tp": (4, three(FOUR_RANKS)),
    "4 ranks, experts": (4, one(FOUR_RANKS_EXPERTS)),
}
