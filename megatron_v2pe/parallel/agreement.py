"""All ranks were started alike: their facts are compared through the launcher's store, before any group is made.

    every rank   facts --sha256--> store
    rank 0       all equal? --yes--> verdict: ""
                            `--no--> verdict: send   every rank: facts --> store   rank 0: message --> store
    every rank   continues, or raises the same ConfigError

The store is enough for it, and nothing has to fit together yet: ranks of different layouts would hang in the first
group. 32 bytes of each rank travel where all is well.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import Store

from megatron_v2pe.core.errors import ConfigError

Facts = Mapping[str, str]
"""What a rank was started with: a name that a person understands -> value."""

_SEND = "send"
_MOST_KEYS = 8
_MOST_RANKS = 4
_MOST_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """Facts of one rank, and where it runs."""

    rank: int
    host: str
    facts: Facts


def require_equal_facts(store: Store, facts: Facts, *, rank: int, world_size: int) -> None:
    """Compare the facts of all ranks. Every rank must call it; waits as long as the store does.

    Args:
        store: of this world; its keys `agreement/...` are used.
        facts: of this rank.
        rank: this rank.
        world_size: ranks of the world.

    Raises:
        ConfigError: they differ; names ranks, hosts and what differs. On all ranks.
        DistStoreError: not all ranks came within the store's timeout.
    """
    store.set(f"agreement/digest/{rank}", _digest(facts))
    if rank == 0:
        digests = [store.get(f"agreement/digest/{other}") for other in range(world_size)]
        store.set("agreement/verdict", "" if len(set(digests)) == 1 else _SEND)
    if store.get("agreement/verdict").decode() != _SEND:
        return
    own = {"host": socket.gethostname(), "facts": dict(facts)}
    store.set(f"agreement/facts/{rank}", json.dumps(own))
    if rank == 0:
        received = [json.loads(store.get(f"agreement/facts/{other}")) for other in range(world_size)]
        tables = [RankFacts(rank=number, **values) for number, values in enumerate(received)]
        store.set("agreement/message", describe_differences(tables))
    raise ConfigError(store.get("agreement/message").decode())


def require_equal_in_world(facts: Facts) -> None:
    """The same over the default process group, for what is known later. Collective.

    Raises:
        ConfigError: see `require_equal_facts`.
    """
    found: list[RankFacts] = [RankFacts(rank=0, host="", facts={})] * dist.get_world_size()
    own = RankFacts(rank=dist.get_rank(), host=socket.gethostname(), facts=dict(facts))
    dist.all_gather_object(found, own)
    message = describe_differences(found)
    if message:
        raise ConfigError(message)


def describe_differences(tables: Sequence[RankFacts]) -> str:
    """What differs between ranks as one message, "" when nothing does.

    Those that most ranks share count as right; of as many, those of the lower rank.
    """
    digests = [_digest(each.facts) for each in tables]
    if len(set(digests)) == 1:
        return ""
    usual_digest = Counter(digests).most_common(1)[0][0]
    usual = tables[digests.index(usual_digest)]
    parts = []
    for digest in dict.fromkeys(each for each in digests if each != usual_digest):
        others = [each for each, its in zip(tables, digests, strict=True) if its == digest]
        parts.append(f"{_named(others)}: {_differing(others[0].facts, usual)}")
    return (
        f"ranks were not started alike: {'; '.join(parts)}. Start all ranks with one command, one version of the "
        "software, one environment, the same checkpoint and the same data"
    )


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def _named(ranks: Sequence[RankFacts]) -> str:
    shown = ", ".join(f"rank {each.rank} on {each.host}" for each in ranks[:_MOST_RANKS])
    more = len(ranks) - _MOST_RANKS
    return shown + (f" and {more} more" if more > 0 else "")


def _differing(facts: Facts, usual: RankFacts) -> str:
    names = [name for name in {**usual.facts, **facts} if facts.get(name) != usual.facts.get(name)]
    shown = ", ".join(
        f"{name} is {_short(facts.get(name))} (rank {usual.rank} on {usual.host}: {_short(usual.facts.get(name))})"
        for name in names[:_MOST_KEYS]
    )
    more = len(names) - _MOST_KEYS
    return shown + (f" and {more} more differ" if more > 0 else "")


def _short(value: str | None) -> str:
    if value is None:
        return "not there"
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."
