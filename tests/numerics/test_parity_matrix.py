"""Every layout gives one rank's loss, gradient norm, gradients and updated weights, float32.

Tolerances, relative (the measured worst is in docs/numerics.md beside each):

    loss      of two steps                                                         1e-6
    norm      gradient norm of two steps                                           3e-6
    gradient  of every parameter, to its largest entry; largest entry 0: equal     1e-5
    weight    of every parameter after one and two updates, to its largest change  3e-4

Sums in another order differ by a few float32 roundings (6e-8) of their largest terms, hence 1e-5 at most for a
gradient. A weight near 1 that an update changes by 1e-3 cannot show the change closer than 1e-4: half a rounding.
Adam divides gradients by their own size, and with a small eps the rounding noise of a gradient near 0 would become a
whole step; eps 1e-2 (`parity.Layout.config`) keeps its amplification below max abs(gradient) / eps.
"""

import itertools
import os
import pickle

import pytest

from megatron_v2pe.data.index.cache import locked
from megatron_v2pe.parallel.feature_router import owned_rows
from megatron_v2pe.parallel.shards import sharding_of
from megatron_v2pe.parallel.topology import resolve
from megatron_v2pe.parallel.zigzag import shard_ranges_of_ranks
from tests.numerics.layouts import EIGHT_RANKS, GROUPS
from tests.support import parity, parity_cases

TOLERANCES = {"loss": 1e-6, "norm": 3e-6, "gradient": 1e-5, "weight 1": 3e-4, "weight 2": 3e-4}
SLOW = ("2 ranks, options", "4 ranks without tp", "4 ranks, experts", "4 ranks, by document")
EIGHT = [
    parity.Work(name, layout, parity_cases.covering_cases(start=number))
    for number, (name, layout) in enumerate(EIGHT_RANKS.items())
]


def all_cases(work):
    return [parity.Work(row.name, row.layout, parity_cases.ALL_CASES) for row in work]


def needed(groups):
    """(case, options) pairs that the reference must have."""
    pairs = {(case, row.layout.options) for work in groups for row in work for case in row.cases}
    return sorted(pairs, key=str)


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """One rank's results of the groups that are run; computed once for all workers of a parallel run."""
    here = [item for item in request.session.items if item.path == request.path]
    matrix = [item for item in here if item.originalname == "test_equal_to_one_rank"]
    groups = {item.callspec.params["group"] for item in matrix} or {"2 ranks"}
    wanted = needed([GROUPS[name][1] for name in sorted(groups)])
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with locked(shared / "parity.lock"):
        kept = shared / "parity.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(parity.reference_file(shared, wanted)))
    return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="module")
def whole_reference(tmp_path_factory):
    """One rank's results of all cases."""
    wanted = needed([EIGHT, *(all_cases(work) for _, work in GROUPS.values())])
    return parity.reference_file(tmp_path_factory.mktemp("reference"), wanted, timeout=900)


def check(world_size, work, reference, *, timeout):
    found = parity.compare_ranks(world_size, work, reference, timeout=timeout)
    beyond = [
        f"{name} [{case}] {quantity}: {error:.2g}, {TOLERANCES[quantity]:g} allowed, worst in {where}"
        for (name, case), quantities in found.items()
        for quantity, (error, where) in quantities.items()
        if not error <= TOLERANCES[quantity]
    ]
    assert beyond == [], "\n".join(beyond)


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in GROUPS]
)
def test_equal_to_one_rank(reference, group):
    check(*GROUPS[group], reference, timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("group", GROUPS)
def test_equal_to_one_rank_in_all_cases(whole_reference, group):
    world_size, work = GROUPS[group]
    check(world_size, all_cases(work), whole_reference, timeout=3900)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_ranks(whole_reference):
    check(8, EIGHT, whole_reference, timeout=1700)


def trained_parts(case, options):
    """Parts that must get gradients."""
    frozen = dict(
        vision=options.freeze_vision, projector=options.freeze_projector, language=options.freeze_language
    )
    seen = ("vision", "projector", "language") if case.images != "text" else ("language",)
    return {part for part in seen if not frozen[part]}


def test_every_trained_parameter_has_a_gradient(reference):
    """What is compared is not zero on both sides; what is frozen, or saw no image, is."""
    _, scales = reference
    cases = {str(case): case for case in parity_cases.ALL_CASES}
    for (name, options), by_key in scales.items():
        expected = trained_parts(cases[name], options)
        wrong = [key for key, scale in by_key.items() if (scale > 0) != (key.split(".")[0] in expected)]
        assert wrong == [], (name, options)


SHARDED = {
    row.name: (resolve(row.layout.parallel, world_size), row.cases)
    for world_size, work in GROUPS.values()
    for row in work
    if resolve(row.layout.parallel, world_size).tile_ranks > 1 and row.layout.parallel.cp_sharding == "zigzag"
}
BY_DOCUMENT = {
    row.name: (row.layout, resolve(row.layout.parallel, world_size), row.cases)
    for world_size, work in GROUPS.values()
    for row in work
    if row.layout.parallel.cp_sharding != "zigzag"
}


@pytest.mark.parametrize("name", SHARDED)
def test_the_cases_are_what_their_names_say(name):
    """ "one shard": one rank owns every visual token. "spread": several do. Some ranks encode no tile."""
    plan, cases = SHARDED[name]
    for case in cases:
        owners, fewest = set(), []
        for micro_batch in range(4):
            batch = parity_cases.pack(
                case, micro_batch, pad_to_multiple=plan.pad_to_multiple, tile_range_of=lambda _: (0, 0)
            )
            shards = shard_ranges_of_ranks(batch.layout.cu_seqlens, cp=plan.cp)
            owned = [len(slots) for slots, _ in owned_rows(batch.layout, shards, plan=plan)]
            owners |= {rank for rank, count in enumerate(owned) if count}
            fewest.append(batch.num_tiles // plan.tile_ranks)
        assert len(owners) == {"text": 0, "one shard": 1, "spread": plan.tile_ranks}[case.images]
        assert case.images == "spread" or min(fewest) == 0


def shapes_by_document(name):
    """Numbers of ranks that documents of a row's packs lie on, and whether some shards differ in length."""
    layout, plan, cases = BY_DOCUMENT[name]
    sharding = sharding_of(layout.parallel, layout.options.arch)
    counts, lengths = set(), set()
    for case, micro_batch in itertools.product(cases, range(4)):
        batch = parity_cases.pack(
            case, micro_batch, pad_to_multiple=plan.pad_to_multiple, tile_range_of=lambda _: (0, 0)
        )
        shards = sharding.shards(batch.layout.cu_seqlens, cp=plan.cp)
        if shards.holders is not None:
            counts |= set(map(len, shards.holders))
            lengths.add(len({shards.tokens(rank) for rank in range(plan.cp)}) > 1)
    return counts, True in lengths


@pytest.mark.parametrize("cp", sorted({plan.cp for _, plan, _ in BY_DOCUMENT.values()}))
def test_documents_lie_on_some_ranks_and_on_all(cp):
    """The packs of the rows with this cp have both, and shards of different lengths. A single row need not."""
    shapes = [shapes_by_document(name) for name, (_, plan, _) in BY_DOCUMENT.items() if plan.cp == cp]
    counts = set().union(*(counts for counts, _ in shapes))
    assert min(counts) < max(counts) == cp
    assert any(differ for _, differ in shapes)


def test_three_cases_of_six_layouts_are_all_cases():
    covered = {case for start in range(6) for case in parity_cases.covering_cases(start=start)}
    assert covered == set(parity_cases.ALL_CASES)
    for start in range(6):
        cases = parity_cases.covering_cases(start=start)
        assert {case.images for case in cases} == set(parity_cases.IMAGES)
        assert {case.mode for case in cases} == set(parity_cases.POSITIONS)
        assert {case.packing for case in cases} == set(parity_cases.PACKINGS)
