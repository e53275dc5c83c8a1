"""A name for each world that the ranks form, so that entries of an earlier one in the launcher's store are not read.

torchrun keeps one store over its restarts, and a process may join several worlds in a row. Under the names of an
earlier world gloo finds addresses at which no process listens any more. A count of joins cannot distinguish
worlds: after a restart the nodes may differ in their counts. So rank 0 chooses a name and gives it to the others:

    others   n = arrivals + 1  ........................ wait for name/n, read it, taken/NAME + 1
    rank 0   name/1 .. name/arrivals = NAME, repeated until all others have read it

Numbers of arrivals are never used twice. Those of ranks that died get a name too, which no process reads.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import Store

_POLL_SECONDS = 0.01


def agree_on_name(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that no other world of this store has; equal on all ranks, each of which must call it.

    Raises:
        TimeoutError: not all ranks joined within `timeout` (rank 0).
        DistStoreError: rank 0 gave no name within the store's timeout (the others).
    """
    if rank == 0:
        name = uuid.uuid4().hex
        _hand_out(store, name, num_others=world_size - 1, timeout=timeout)
        return name
    arrival = store.add("world_arrivals", 1)
    name = store.get(f"world_name/{arrival}").decode()
    store.add(f"world_taken/{name}", 1)
    return name


def _hand_out(store: Store, name: str, *, num_others: int, timeout: timedelta) -> None:
    end = time.monotonic() + timeout.total_seconds()
    answered = 0
    while (taken := store.add(f"world_taken/{name}", 0)) < num_others:
        arrived = store.add("world_arrivals", 0)
        for arrival in range(answered + 1, arrived + 1):
            store.set(f"world_name/{arrival}", name)
        answered = arrived
        if time.monotonic() > end:
            raise TimeoutError(f"{taken} of {num_others} other ranks joined within {timeout}")
        time.sleep(_POLL_SECONDS)
