"""A proxy before an object store on loopback, which slows down, fails and cuts as a test tells it."""

from __future__ import annotations

import contextlib
import http.client
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, list[tuple[str, str]], bytes]  # status, headers, body
_OF_A_CONNECTION = ("connection", "transfer-encoding")


@dataclass(frozen=True)
class Request:
    """One request to the store; `number` counts them.

    `action` is put, begin (of an upload in parts), get, head, list or delete, and `key` names the object or the prefix.
    """

    number: int
    action: str
    key: str
    login: str = ""  # the Authorization header


@dataclass
class Faults:
    """Faults of the proxy. `choose` names a fault by the request: "" none, "500", "503", "cut" (the answer's body is cut in the
    middle), "lost" (the request is carried out and its answer is lost), "reset" (it is not carried out), or the code of a
    refusal, such as AccessDenied. A request that does not come whole is no request.
    """

    choose: Callable[[Request], str] = lambda request: ""
    latency_s: float = 0.0
    bytes_per_s: float = 0.0  # of the link, shared by all requests; 0: no limit
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    free_at: float = 0.0  # when the link has carried what it was given
    num_carried: int = 0  # bytes of bodies
    carried: Callable[[int], None] = lambda num_bytes: None  # told their number when there are more

    def carry(self, num_bytes: int) -> None:
        """Wait until the link has carried so many bytes more."""
        with self.lock:
            self.num_carried += num_bytes
        self.carried(self.num_carried)
        if self.bytes_per_s:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + num_bytes / self.bytes_per_s
                wait_s = self.free_at - time.monotonic()
            time.sleep(max(0.0, wait_s))


@contextmanager
def proxied(upstream: int, handler: type[Proxy], faults: Faults, address: str = "127.0.0.1") -> Iterator[int]:
    """The port at `address` of a proxy before the server at a port of this machine, until the block ends."""
    methods = {f"do_{name}": Proxy.forward for name in ("GET", "PUT", "POST", "DELETE", "HEAD")}
    server = _Server((address, 0), type("Handler", (handler,), {"upstream": upstream, "state": faults, **methods}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(port: int, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
    """The answer of a server on this machine."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {**headers, "Connection": "close"})
        with connection.getresponse() as answer:
            data, given = answer.read(), answer.getheaders()
    return answer.status, [(key, value) for key, value in given if key.lower() not in _OF_A_CONNECTION], data


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Proxy(BaseHTTPRequestHandler):
    """One connection. A store's own class says what its requests mean and how it refuses them."""

    upstream: int
    state: Faults
    protocol_version = "HTTP/1.1"

    def meaning(self, body: bytes) -> tuple[str, str]:
        """Action and key of the request."""
        raise NotImplementedError

    def planted(self, fault: str) -> Answer:
        """The answer with an error."""
        raise NotImplementedError

    def carry_out(self, body: bytes) -> Answer:
        return ask(self.upstream, self.command, self.path, body, self.kept())

    def kept(self) -> dict[str, str]:
        """The headers of the request that are passed on."""
        return {key: value for key, value in self.headers.items() if key.lower() not in _OF_A_CONNECTION}

    def log_message(self, *_: Any) -> None:
        return

    def forward(self) -> None:
        state, body = self.state, self._body()
        action, key = self.meaning(body)
        with state.lock:
            request = Request(len(state.requests), action, key, self.headers.get("Authorization", ""))
            state.requests.append(request)
        fault = state.choose(request)
        time.sleep(state.latency_s * random.uniform(0.5, 1.5))
        if fault == "reset":
            self.close_connection = True
        elif fault not in ("", "cut", "lost"):
            self._answer(*self.planted(fault))
        else:
            answer = self.carry_out(body)
            if fault == "lost":
                self.close_connection = True
            else:
                self._answer(*answer, cut=fault == "cut")

    def _body(self) -> bytes:
        """The body of the request, over the link."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            data = b""
            while size := int(self._whole(self.rfile.readline()).split(b";")[0], 16):
                data += self._whole(self.rfile.read(size), size)
                self.state.carry(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue
            return data
        left, data = int(self.headers.get("Content-Length") or 0), b""
        while left:
            block = self._whole(self.rfile.read(min(left, 256 << 10)))
            left -= len(block)
            data += block
            self.state.carry(len(block))
        return data

    def _whole(self, data: bytes, size: int = 1) -> bytes:
        if len(data) < size:
            self.close_connection = True
            raise ConnectionAbortedError
        return data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response_only(status)
            given = {key.lower() for key, _ in headers}
            for key, value in headers:
                self.send_header(key, value)
            if "content-length" not in given:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = len(data) // 2 if cut else len(data)
            for start in range(0, end, 256 << 10):
                block = data[start : min(start + (256 << 10), end)]
                self.state.carry(len(block))
                self.wfile.write(block)
            if cut:
                self.close_connection = True
