"""core.logging: rank 0 informs, every rank warns, nothing goes to stdout."""

import pytest

from megatron_v2pe.core.logging import get_logger, setup_logging


@pytest.mark.parametrize(("rank", "informs"), [(0, True), (3, False)])
def test_levels_by_rank(capsys, rank, informs):
    setup_logging(rank)
    setup_logging(rank)  # a second call must not double the lines
    log = get_logger("megatron_v2pe.train.loop")
    log.info("step 1")
    log.warning("slow disk")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("step 1") == int(informs)
    assert captured.err.count(f"rank {rank} WARNING slow disk") == 1


def test_names_outside_the_package_are_put_under_it():
    assert get_logger("tool").name == "megatron_v2pe.tool"
    assert get_logger("megatron_v2pe.data.loader").name == "megatron_v2pe.data.loader"
