"""The HTTP side: routes, keys, streams. It runs in a thread of rank 0 and never touches the model.

POST /v1/chat/completions    GET /v1/models    GET /health    GET /metrics
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_v2pe.inference.serve.jobs import Event, Inbox, Job
from megatron_v2pe.inference.serve.metrics import Metrics
from megatron_v2pe.inference.serve.wire import ChatRequest, Limits, Piece, Reply, RequestError, parse_request

_POLL_SECONDS = 0.2  # how soon a client that went is noticed
_PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Server:
    """Handlers of one server.

    Args:
        inbox: where requests go.
        metrics: what is counted.
        limits: what requests may ask for.
        api_key: that requests must carry; "" asks for none.
    """

    def __init__(self, *, inbox: Inbox, metrics: Metrics, limits: Limits, api_key: str) -> None:
        self._inbox, self._metrics, self._limits, self._api_key = inbox, metrics, limits, api_key

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics_text),
        ]
        return Starlette(routes=routes)

    async def _complete(self, request: Request) -> Response:
        try:
            self._check_key(request)
            chat_request = parse_request(await self._body(request), self._limits)
            waiting = _Waiting(self._inbox, chat_request)
        except RequestError as error:
            return self._refusal(error)
        except ClientDisconnect:
            self._metrics.note_request(499)
            return Response(status_code=499)
        reply = Reply(request_id=f"chatcmpl-{waiting.job.number}", model=self._limits.model)
        if chat_request.stream:
            return await self._streamed(request, waiting, reply)
        return await self._whole(request, waiting, reply)

    async def _whole(self, request: Request, waiting: _Waiting, reply: Reply) -> Response:
        pieces, chat_request = list[Piece](), waiting.job.request
        try:
            while sum(piece.finish_reason is not None for piece in pieces) < chat_request.num_choices:
                event = await waiting.next_event()
                if await request.is_disconnected():
                    self._metrics.note_request(499)
                    return Response(status_code=499)
                if isinstance(event, RequestError):
                    return self._refusal(event)
                if event is not None:
                    pieces.append(event)
        finally:
            waiting.close()
        self._metrics.note_request(200)
        return JSONResponse(reply.whole(pieces, waiting.job.usage))

    async def _streamed(self, request: Request, waiting: _Waiting, reply: Reply) -> Response:
        """The first event decides the status: a request that cannot be answered is an HTTP error, not a stream."""
        first: Event | None = None
        try:
            while first is None:
                first = await waiting.next_event()
                if first is None and await request.is_disconnected():
                    waiting.close()
                    self._metrics.note_request(499)
                    return Response(status_code=499)
        except BaseException:
            waiting.close()
            raise
        if isinstance(first, RequestError):
            waiting.close()
            return self._refusal(first)
        return StreamingResponse(self._events(waiting, reply, first), media_type="text/event-stream")

    async def _events(self, waiting: _Waiting, reply: Reply, piece: Piece) -> AsyncIterator[str]:
        status = 499  # unless the last event is reached
        opened, pending = {piece.index}, waiting.job.request.num_choices - (piece.finish_reason is not None)
        try:
            yield _event(reply.chunk(piece, opens=True))
            while pending:
                event = await waiting.next_event()
                if isinstance(event, RequestError):
                    yield _event(event.body)
                    status = event.status
                    return
                if event is not None:
                    yield _event(reply.chunk(event, opens=event.index not in opened))
                    opened.add(event.index)
                    pending -= event.finish_reason is not None
            if waiting.job.request.with_usage:
                yield _event(reply.chunk(None, usage=waiting.job.usage))
            yield "data: [DONE]\n\n"
            status = 200
        finally:
            waiting.close()
            self._metrics.note_request(status)

    async def _body(self, request: Request) -> Any:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self._limits.max_body_bytes:
                limit = self._limits.max_body_bytes
                raise RequestError(
                    413, "too_large", f"the body is larger than this server's limit of {limit} bytes"
                )
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, "bad_json", f"the body is not valid json ({error})") from None

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._api_key and not hmac.compare_digest(given, self._api_key.encode()):
            raise RequestError(401, "invalid_api_key", "the request carries no key, or not the server's")

    def _refusal(self, error: RequestError) -> Response:
        self._metrics.note_request(error.status)
        return JSONResponse(error.body, status_code=error.status)

    async def _models(self, request: Request) -> Response:
        try:
            self._check_key(request)
        except RequestError as error:
            return self._refusal(error)
        model = {"id": self._limits.model, "object": "model", "created": 0, "owned_by": "megatron_v2pe"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        if self._inbox.is_draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=_PROMETHEUS_TYPE)


class _Waiting:
    """A job whose events are awaited in the HTTP thread."""

    def __init__(self, inbox: Inbox, request: ChatRequest) -> None:
        self._inbox, self._events = inbox, asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job: Job = inbox.submit(request, deliver)

    async def next_event(self) -> Event | None:
        """The next one, None when none came for a moment."""
        try:
            return await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
        except asyncio.TimeoutError:
            return None

    def close(self) -> None:
        """Nobody waits any more; what is still computed for it ends."""
        self._inbox.cancel(self.job)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
