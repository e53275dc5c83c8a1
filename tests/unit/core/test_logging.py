"""core.logging: rank 0 informs, every rank warns, nothing goes to stdout."""

import logging
import re

import pytest

from megatron_v2pe.core.logging import quiet_dependencies, setup_logging


@pytest.mark.parametrize(("rank", "informs"), [(0, True), (3, False)])
def test_levels_by_rank(capsys, rank, informs):
    setup_logging(rank)
    setup_logging(rank)  # a second call must not double the lines
    log = logging.getLogger("megatron_v2pe.train.loop")
    log.info("step 1")
    log.warning("slow disk")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("step 1") == int(informs)
    assert captured.err.count(f"rank {rank} WARNING slow disk") == 1


def test_only_unexpected_lines_name_rank_and_level(capsys):
    log = logging.getLogger("megatron_v2pe.train.loop")
    setup_logging(0)
    log.info("step 1")
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 1\n", capsys.readouterr().err)
    log.warning("slow disk")
    assert capsys.readouterr().err.endswith(" rank 0 WARNING slow disk\n")


def test_lines_for_developers_are_hidden_and_others_of_the_same_logger_are_not(caplog):
    log = logging.getLogger("megatron.core.models.gpt.gpt_model")
    before = list(log.filters)
    try:
        quiet_dependencies()
        log.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
        log.warning("the output layer is not sharded")
    finally:
        log.filters[:] = before
    assert [record.message for record in caplog.records] == ["the output layer is not sharded"]
