"""`preflight` as a user starts it, on two ranks that share a sequence, and with what must not start.

Strategy: the command on one and two ranks, table and exit code; then the attention check with a broken exchange.
"""

import re

import pytest

from tests.support import tiny
from tests.support.spawn import run_ranks
from tests.support.warm import run_verb

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight")
    return tiny.prepared(root)


def looked_at(config, *arguments, ranks=1):
    return run_verb("preflight", config, *arguments, ranks=ranks)


def test_two_ranks_go(config):
    done = looked_at(config, "parallel.cp=2", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(go|note|no-go) +(\S.*?)  ", done.stdout, re.M)
    found = {name: verdict for verdict, name in lines}
    assert found.keys() >= {
        "all-reduce",
        "send/recv",
        "clocks",
        "shared disk",
        "attention",
        "free space",
        "data",
    }
    assert found["attention"] == found["shared disk"] == found["data"] == "go"
    assert re.search(r"^GO: 2 ranks", done.stdout, re.M)
    assert "cp 2, float32" in done.stdout


def test_a_full_disk_does_not_go(config):
    done = looked_at(config, "--free-gb", "1e9", "parallel.cp=8")
    assert done.returncode == 1, done.stderr
    assert re.search(r"^no-go +free space .* GB too few", done.stdout, re.M)
    assert re.search(r"^note +layout .*cp 8 on 1 ranks: checked as one rank", done.stdout, re.M)
    assert done.stdout.splitlines()[-1].startswith("NO-GO: 1 rank,")


@pytest.mark.parametrize("argument", ["--free-gb=-1", "model.checkpoint=/nowhere"])
def test_mistakes(config, argument):
    done = looked_at(config, argument)
    assert done.returncode == 2
    assert argument.partition("=")[2] in done.stderr
    assert "Traceback" not in done.stderr


def attention_finding(rank, world_size, checkpoint, swaps):
    """Verdicts of the attention check, plain and with sinks and windows; `swaps`: ranks have each other's tokens."""
    from dataclasses import replace

    from megatron_v2pe.config.load import load_run_config
    from megatron_v2pe.parallel.topology import init_distributed, resolve
    from megatron_v2pe.preflight import inputs, parity

    overrides = [f"model.checkpoint={checkpoint}", "parallel.cp=2", "runtime.dtype=float32"]
    config = load_run_config(None, overrides)
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=0)
    if swaps:
        context = replace(context, ranks=replace(context.ranks, cp_rank=1 - context.ranks.cp_rank))
    arch, plain = inputs.read_model(config), parity.language_config

    def windowed(*args):
        decoder = plain(*args)
        decoder.softmax_type, decoder.window_size, decoder.window_attn_skip_freq = "learnable", (70, 0), 2
        return decoder

    found = [parity.check_attention(config, arch, context).verdict]
    parity.language_config = windowed
    return [*found, parity.check_attention(config, arch, context).verdict]


def test_attention_over_wrong_shards_is_found(config):
    checkpoint = config.parent / "checkpoint"
    assert run_ranks(attention_finding, 2, checkpoint, False, timeout=120) == [["go", "go"]] * 2
    assert run_ranks(attention_finding, 2, checkpoint, True, timeout=120) == [["no-go", "no-go"]] * 2
