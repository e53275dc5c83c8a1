"""The comparison of the parity matrix must see every wrong variant of `megatron_v2pe.verification.prove.mutations`.

Each variant replaces one function inside the ranks. It is right on one rank (checked too), so that what fails is the
layout and not the arithmetic. The error must be at least 100 times the tolerance.
"""

import pytest

from megatron_v2pe.verification.prove.mutations import CAUGHT, MUTATIONS
from tests.numerics.layouts import EXPERTS, of
from tests.numerics.test_parity_matrix import TOLERANCES
from tests.support import parity, parity_cases
from tests.support.parity import Work

CASE = parity_cases.Case("packed", "spread", "v2pe_random")
CP2, TP2, TP2SP, DP2, PP2 = of(cp=2), of(tp=2), of(tp=2, sp=True), of(), of(pp=2)
EP2 = of(ep=2, options=EXPERTS)
CP2_BY_DOCUMENT = of(cp=2, cp_sharding="by_document")
LAYOUTS = {
    "labels shifted after the cut": [CP2],
    "zigzag over the whole row": [CP2, CP2_BY_DOCUMENT],
    "positions sliced contiguously": [CP2],
    "positions of another rank": [CP2, CP2_BY_DOCUMENT],
    "keys get no gradients of other ranks": [CP2, CP2_BY_DOCUMENT],
    "positions reversed on later stages": [PP2],
    "image rows in another order": [CP2, TP2SP],
    "no gradients through the router": [CP2],
    "norms without the mark": [TP2SP],
    "vision without the mark": [TP2SP],
    "vision counted once per tp rank": [TP2],
    "split weights counted on the first tp rank": [TP2],
    "gradients of experts summed over all ranks": [EP2],
    "gradients divided by each rank's own weights": [DP2],
}


def _rows():
    """{name of a row: (mutation, layout)}; a mutation on two layouts has a row for each."""
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            yield name + suffix_of(layout, len(layouts)), (MUTATIONS[name], layout)


def suffix_of(layout, count):
    parallel = layout.parallel
    if count == 1:
        return ""
    if parallel.cp_sharding == "by_document":
        return ", by document"
    return ", sp" if parallel.sequence_parallel else ", cp"


VARIANTS = dict(_rows())


def reference_of_variants(folder):
    """One rank's results for the models of all rows."""
    options = {layout.options for _, layout in VARIANTS.values()}
    return parity.reference_file(folder, [(CASE, each) for each in sorted(options, key=str)])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return reference_of_variants(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def found(reference):
    """Errors of every variant; all run in the same two processes."""
    work = [Work(name, layout, (CASE,), mutation.variant) for name, (mutation, layout) in VARIANTS.items()]
    return parity.compare_ranks(2, work, reference, timeout=280)


@pytest.mark.distributed
@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_variant_is_seen(found, name):
    mutation, _ = VARIANTS[name]
    errors = {quantity: error for quantity, (error, _) in found[name, str(CASE)].items()}
    for quantity in mutation.wrong:
        assert errors[quantity] > CAUGHT * TOLERANCES[quantity], errors
    for quantity in mutation.right:
        assert errors[quantity] <= TOLERANCES[quantity], errors


def test_every_mutation_has_a_layout():
    assert list(LAYOUTS) == list(MUTATIONS)


def test_the_variants_are_right_on_one_rank(reference):
    work = [Work(name, of(), (CASE,), mutation.variant) for name, (mutation, _) in VARIANTS.items()]
    found = parity.compare_ranks(1, work, reference, timeout=280)
    for name, errors in found.items():
        assert all(errors[quantity][0] <= TOLERANCES[quantity] for quantity in errors), (name, errors)
