"""One server from start to end: bind, load, answer, drain.

The address is bound before the model is loaded, so that a port that is taken is reported at once. SIGTERM and SIGINT
drain: no more requests, those that are here are answered; a second one ends at once.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.chat import Chat
from megatron_v2pe.inference.serve.app import Server
from megatron_v2pe.inference.serve.jobs import Inbox
from megatron_v2pe.inference.serve.metrics import Metrics
from megatron_v2pe.inference.serve.wire import Limits
from megatron_v2pe.inference.serve.worker import Worker

logger = logging.getLogger(__name__)


def bind(host: str, port: int, *, api_key: str) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address cannot be bound, or is open to others and no key is asked for.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not ipaddress.ip_address(found[4][0]).is_loopback and not api_key:
            raise ConfigError(
                f"--host is {host}, which others can reach; give --api-key-file (or V2PE_API_KEY), or bind 127.0.0.1"
            )
        listener = socket.socket(found[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(128)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be bound ({error.strerror or error}); if another server runs there, "
            "choose another port"
        ) from None
    return listener


def serve(
    chat: Chat,
    listener: socket.socket | None,
    *,
    limits: Limits,
    api_key: str,
    max_waiting: int,
    max_running: int,
) -> None:
    """Answer requests until a signal ends it; every rank calls it, rank 0 with the socket."""
    if listener is None:
        with _drain_on_signals(lambda: None):
            Worker(chat, inbox=None, metrics=None, max_running=max_running).run()
        return
    inbox, metrics = Inbox(max_waiting), Metrics()
    server = Server(inbox=inbox, metrics=metrics, limits=limits, api_key=api_key)
    config = uvicorn.Config(server.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=10)
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    host, port = listener.getsockname()[:2]
    with _drain_on_signals(inbox.drain):
        thread.start()
        logger.info("serving %s at http://%s:%d/v1 (%s)", limits.model, host, port, chat.stride.reason)
        try:
            Worker(chat, inbox=inbox, metrics=metrics, max_running=max_running).run()
        finally:
            http.should_exit = True
            thread.join(timeout=15)
    logger.info("all requests are answered; the server ends")


@contextmanager
def _drain_on_signals(drain: Callable[[], None]) -> Iterator[None]:
    """The first signal drains, the second one is the default again."""

    def handler(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        drain()

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
