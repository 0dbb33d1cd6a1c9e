"""Faults on demand, and a log of what was asked: one ASGI layer around the whole Hub."""

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Literal

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

FaultKind = Literal["status", "slow", "drop_request", "drop_response", "lose_response", "truncate", "corrupt"]


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match.

    - `status`: answered with `status` (and `retry_after`, in seconds) instead of being handled
    - `slow`: handled after `seconds`, unless the client has gone by then
    - `drop_request`: the connection breaks when half of the request's body has arrived; nothing is done
    - `drop_response`: the connection breaks halfway through the answer's body
    - `lose_response`: the request is carried out, then the connection breaks before any answer
    - `truncate`: half of the body, in a well-formed answer
    - `corrupt`: the whole body, its last byte changed
    """

    kind: FaultKind
    path: str
    method: str = "GET"
    times: int = 1
    status: int = 503
    retry_after: int | None = None
    seconds: float = 0.0


@dataclass
class Exchange:
    """One request and its answer; `num_bytes` is the size of the answer's body, status 0 means none was given."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    num_bytes: int = 0


class OpenProtocol(H11Protocol):
    """uvicorn's HTTP protocol, its socket within reach of the application: only so can a connection be broken."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class FaultLayer:
    """Wraps `app`: keeps the log, applies faults, and routes undecoded paths (`refs%2Fpr%2F1` is one segment)."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] = []

    def _take(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["path"] = scope["raw_path"].decode()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        exchange = Exchange(scope["method"], scope["path"], headers.get("range"), "authorization" in headers)
        self.exchanges.append(exchange)
        fault = self._take(exchange.method, exchange.path)
        answer = Answer(send, exchange, fault, scope["state"]["transport"])
        if fault is not None and fault.kind == "drop_request":
            await read_body(receive, int(headers.get("content-length", 0)) // 2)
            scope["state"]["transport"].abort()
        elif fault is not None and fault.kind == "status":
            await read_body(receive)  # else the client may see a broken pipe before it sees the answer
            retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            response = JSONResponse({"error": f"fault {fault.status}"}, fault.status, headers=retry)
            await response(scope, receive, answer)
        else:
            await asyncio.sleep(fault.seconds if fault is not None else 0)
            if not scope["state"]["transport"].is_closing():
                await self.app(scope, receive, answer)


async def read_body(receive: Receive, limit: int | None = None) -> None:
    """Reads a request's body, or its first `limit` bytes, and forgets it."""
    seen = 0
    while limit is None or seen < limit:
        message = await receive()
        seen += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


class Answer:
    """An ASGI `send` that notes what goes out and lets a fault alter it."""

    def __init__(self, send: Send, exchange: Exchange, fault: Fault | None, transport: asyncio.Transport):
        self.send, self.exchange, self.transport = send, exchange, transport
        self.kind = fault.kind if fault is not None else None
        self.remaining: int | None = None  # body bytes that may still go out, None for all
        self.is_cut = False

    async def __call__(self, message: Message) -> None:
        if self.kind == "lose_response":
            self.transport.abort()
        elif message["type"] == "http.response.start":
            self.exchange.status = message["status"]
            await self.send(self._start(message))
        elif not self.is_cut:
            await self._body(message)

    def _start(self, message: Message) -> dict[str, Any]:
        headers = dict(message["headers"])
        if self.kind in ("truncate", "drop_response", "corrupt"):
            size = int(headers.get(b"content-length", 0))
            self.remaining = size if self.kind == "corrupt" else size // 2
            if self.kind == "truncate":
                headers[b"content-length"] = str(self.remaining).encode()
        return {**message, "headers": list(headers.items())}

    async def _body(self, message: Message) -> None:
        body = message.get("body", b"")
        if self.remaining is not None:
            body = body[: self.remaining]
            self.remaining -= len(body)
            self.is_cut = self.remaining == 0
            if self.is_cut and self.kind == "corrupt" and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
        self.exchange.num_bytes += len(body)
        more = message.get("more_body", False) and not (self.is_cut and self.kind != "drop_response")
        await self.send({**message, "body": body, "more_body": more or self.kind == "drop_response"})
        if self.is_cut and self.kind == "drop_response":
            self.transport.close()
