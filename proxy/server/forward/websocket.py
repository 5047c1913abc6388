"""A WebSocket through (RFC 6455): every message both ways, and its end; the instance is leased as long as it lasts.

The engine is asked first, so that its refusal is still an HTTP answer, and its choice of subprotocol the client's.
Pings are each hop's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from proxy.errors import InvalidRequestError, NoHostError, RouteNotFoundError, UpgradeRequiredError, UpstreamError
from proxy.fleet.peers import Hop
from proxy.server import request_id
from proxy.server.auth.caller import KEY_PROTOCOL, caller_of
from proxy.server.auth.peer_caller import FROM_PEER
from proxy.server.forward import routes
from proxy.server.forward.fields import keep_alive_s, max_wait_s
from proxy.server.forward.hops import marks_of
from proxy.server.forward.json_edit import edited
from proxy.server.safe_logging import path_of

if TYPE_CHECKING:
    from proxy.fleet.fleet import Fleet
    from proxy.pool.lease import Lease
    from proxy.pool.pool import Pool
    from proxy.server.forward.model_resolver import Address, Addressing
    from proxy.telemetry.metrics import Metrics

    Socket = web.WebSocketResponse[Any] | aiohttp.ClientWebSocketResponse[Any]

log = logging.getLogger("warmpool.request")

_ATTEMPTS: Final = 2
_PING_S: Final = 30.0
_CLOSE_S: Final = 2.0
"""How long the other side may take to say goodbye."""
_CREDENTIALS: Final = (KEY_PROTOCOL, "openai-organization.", "openai-project.", "openai-ephemeral-")
"""Browsers cannot send headers, so OpenAI's clients put these among the subprotocols; they are for this proxy."""
_PASSED_ON: Final = ("User-Agent", "Accept-Language", "traceparent", "tracestate")
_UPDATE_BYTES: Final = 64 << 10
"""A `session.update` is not larger; what is, is passed on unread."""

_VERSIONS: Final = frozenset({"13", "8", "7"})
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{22}==")
"""16 bytes in Base64."""
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NOT_TO_SEND: Final = frozenset({1004, 1005, 1006, 1015})


@dataclass(slots=True)
class _End:
    """How a side ended the session: with a close frame, or without one (`code` is None)."""

    code: int | None
    reason: str = ""


@dataclass(slots=True)
class _Session:
    """What is noted of one session."""

    address: Address
    active_at: float = field(default_factory=time.monotonic)
    messages: int = 0
    bytes: int = 0


class Realtime:
    """Relays `/v1/realtime`."""

    def __init__(self, pool: Pool, metrics: Metrics, addressing: Addressing, fleet: Fleet | None = None) -> None:
        self._fleet = fleet
        self._pool = pool
        self._metrics = metrics
        self._addressing = addressing

    async def relay(self, request: web.Request) -> web.StreamResponse:
        """The session, from the client's request to its end. Raises RequestError before it has begun."""
        began = time.perf_counter()
        match = routes.find(request.method, request.rel_url.raw_path, request.rel_url.raw_query_string)
        if not _asks_for_upgrade(request):
            raise UpgradeRequiredError(f"{match.route.path} is a WebSocket: the request must ask for an upgrade.")
        address = self._addressing.find(match, "", b"")
        caller = caller_of(request)
        if caller is not None:
            caller.check_model(address.model)
        for attempt in range(1, _ATTEMPTS + 1):
            async with await self._lease(request, address) as lease:
                lease.keep_s = keep_alive_s(request.headers)
                if caller is not None:
                    lease.charge(caller.name)
                try:
                    engine = await self._connect(request, address, lease)
                except (aiohttp.ClientError, TimeoutError) as error:
                    log.warning("%s: no WebSocket: %s", lease.instance_id, _in_words(error))
                    if not (lease.is_remote and isinstance(error, aiohttp.WSServerHandshakeError)):
                        await lease.suspect()
                    if attempt < _ATTEMPTS:
                        continue
                    raise UpstreamError(f"The engine of model {address.model!r} failed before it answered.") from error
                session = _Session(address)
                try:
                    return await self._session(request, session, lease, engine)
                finally:
                    await engine.close(code=WSCloseCode.GOING_AWAY)
                    self._account(request, session, lease, began)
        raise AssertionError("unreachable")

    async def _lease(self, request: web.Request, address: Address) -> Lease:
        """A hold on an instance here, or on another host, where it waits; as `Hops.lease`, but tried once."""
        fleet, caller, most_s = self._fleet, caller_of(request), max_wait_s(request.headers)
        name = address.model if address.elsewhere else self._pool.served_name(address.model)
        if fleet is not None and not request.get(FROM_PEER, False):
            lease = fleet.lease(name, Hop(final=True), most_s, may_stay=not address.elsewhere)
            if lease is not None:
                return lease
        if address.elsewhere:
            raise NoHostError(f"No host would serve {name!r} now, or in the time that the request waits.")
        priority = caller.priority if caller is not None else 0
        return await self._pool.lease(name, priority=priority, max_wait_s=most_s, preferred=address.instance)

    async def _connect(
        self, request: web.Request, address: Address, lease: Lease
    ) -> aiohttp.ClientWebSocketResponse[Any]:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        if lease.is_remote and self._fleet is not None:
            headers |= marks_of(self._fleet.host, caller_of(request), max_wait_s(request.headers))
        try:
            return await lease.client.websocket(
                address.target,
                protocols=_protocols(request),
                headers={**headers, request_id.HEADER: request_id.of(request)},
                most_bytes=self._pool.settings.server.body_limit,
                ping_s=_PING_S,
                close_s=_CLOSE_S,
            )
        except aiohttp.WSServerHandshakeError as error:
            # 403 is Starlette's answer where there is no such WebSocket.
            if error.status in {403, 404}:
                raise RouteNotFoundError(
                    f"The engine of model {address.model!r} does not offer {address.target}."
                ) from None
            raise

    async def _session(
        self, request: web.Request, session: _Session, lease: Lease, engine: aiohttp.ClientWebSocketResponse[Any]
    ) -> web.StreamResponse:
        settings = self._pool.settings.server
        client = web.WebSocketResponse(
            protocols=(engine.protocol,) if engine.protocol else (),
            max_msg_size=settings.body_limit,
            heartbeat=_PING_S,
            timeout=_CLOSE_S,
            autoclose=False,
            compress=False,
        )
        client.headers["x-warmpool-tier"] = lease.found.label
        client.headers["x-warmpool-instance"] = lease.instance_id
        await client.prepare(request)
        end = _End(WSCloseCode.GOING_AWAY, "the server is shutting down")
        up = asyncio.create_task(self._pump(client, engine, session, self._with_known_model), name="realtime up")
        down = asyncio.create_task(self._pump(engine, client, session, None), name="realtime down")
        idle = asyncio.create_task(_idle(session, settings.websocket_idle_timeout), name="realtime idle")
        try:
            await asyncio.wait([up, down, idle], return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                end = up.result()
                await engine.close(code=_sendable(end.code, WSCloseCode.GOING_AWAY), message=end.reason.encode())
            elif down.done():
                end = down.result()
                if end.code is None:
                    end.reason = "the engine's connection broke"
                    await lease.suspect()
            else:
                end = _End(WSCloseCode.GOING_AWAY, "idle for too long")
        finally:
            for task in (up, down, idle):
                task.cancel()
            await asyncio.wait([up, down, idle])
            await client.close(code=_sendable(end.code, WSCloseCode.INTERNAL_ERROR), message=end.reason.encode())
        return client

    async def _pump(self, source: Socket, sink: Socket, session: _Session, change: Any) -> _End:
        """Pass messages on until the source ends."""
        while True:
            message = await source.receive()
            session.active_at = time.monotonic()
            try:
                match message.type:
                    case WSMsgType.TEXT:
                        text = change(session.address.model, message.data) if change is not None else message.data
                        await sink.send_str(text)
                    case WSMsgType.BINARY:
                        await sink.send_bytes(message.data)
                    case WSMsgType.CLOSE:
                        # A close frame may be empty; it is a goodbye all the same.
                        return _End(message.data or WSCloseCode.OK, message.extra or "")
                    case WSMsgType.ERROR if isinstance(message.data, aiohttp.WebSocketError):
                        return _End(message.data.code)
                    case _:
                        return _End(None)
            except ConnectionError:  # the sink is gone, which its own pump says better
                await asyncio.Event().wait()
            session.messages += 1
            session.bytes += len(message.data)

    def _with_known_model(self, model: str, text: str) -> str:
        """A `session.update` that names the model by an alias, with the name that the engine knows."""
        if len(text) > _UPDATE_BYTES or "session.update" not in text:
            return text
        try:
            event = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        name = event.get("model") if isinstance(event, dict) and event.get("type") == "session.update" else None
        settings = self._pool.settings
        here = settings.models.get(model)
        if here is None or name not in here.aliases:
            return text
        with contextlib.suppress(InvalidRequestError):
            return edited(text.encode(), {"model": settings.served_name(model)}, [], ["model"]).decode()
        return text

    def _account(self, request: web.Request, session: _Session, lease: Lease, began: float) -> None:
        model, caller = session.address.model, caller_of(request)
        self._metrics.count_request(model, 101)
        fields: dict[str, Any] = {
            "request_id": request_id.of(request),
            "method": request.method,
            "path": path_of(request),
            **({"key": caller.name} if caller is not None else {}),
            "model": model,
            "status": 101,
            "tier": lease.found.label,
            "instance": lease.instance_id,
            "total_ms": round((time.perf_counter() - began) * 1000, 1),
            "messages": session.messages,
            "bytes": session.bytes,
        }
        log.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra=fields)


def _asks_for_upgrade(request: web.Request) -> bool:
    """Whether the request is a handshake (RFC 6455, 4.2.1) as far as the client's fields say.

    aiohttp takes each of them for text that can be encoded, and puts the subprotocols, keys among them, into the log.
    """
    fields = request.headers
    return (
        fields.get("Upgrade", "").strip().lower() == "websocket"
        and any(o.strip().lower() == "upgrade" for value in fields.getall("Connection", ()) for o in value.split(","))
        and fields.get("Sec-WebSocket-Version") in _VERSIONS
        and _KEY.fullmatch(fields.get("Sec-WebSocket-Key", "")) is not None
    )


def _protocols(request: web.Request) -> tuple[str, ...]:
    """The subprotocols that the client offers, without credentials and what is none."""
    offered = (p.strip() for value in request.headers.getall("Sec-WebSocket-Protocol", ()) for p in value.split(","))
    return tuple(p for p in offered if _TOKEN.fullmatch(p) and not p.startswith(_CREDENTIALS))


def _in_words(error: Exception) -> str:
    """Without the URL that was asked for, which has the client's query."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return f"the engine answered {error.status}"
    return str(error) or type(error).__name__


def _sendable(code: int | None, otherwise: int) -> int:
    """A close code that may be sent (RFC 6455, 7.4): this one, unless it stands for the absence of one."""
    return otherwise if code is None or code in _NOT_TO_SEND else code


async def _idle(session: _Session, after_s: float | None) -> None:
    """Return when no message has passed for so long."""
    if after_s is None:
        await asyncio.Event().wait()
        return
    while (left_s := session.active_at + after_s - time.monotonic()) > 0:
        await asyncio.sleep(left_s)
