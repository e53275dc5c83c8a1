"""A layout of several ranks looked at by one process: what only other ranks could do is left out, and said."""

from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.preflight.run import _layout


def test_one_process_stands_for_a_rank_of_the_run(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = RunConfig(parallel=ParallelConfig(tp=2, cp=4), runtime=RuntimeConfig(profile_ranks="0,7"))
    alone, finding = _layout(config)
    assert (alone.parallel.tp, alone.parallel.cp, alone.runtime.profile_ranks) == (1, 1, "0")
    assert (finding.verdict, "checked as one rank" in finding.text) == ("note", True)


def test_a_run_of_one_rank_is_looked_at_as_it_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = RunConfig()
    assert _layout(config)[0] is config
