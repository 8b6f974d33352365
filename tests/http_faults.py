"""An HTTP server on loopback that goes wrong as it is told to: a list of faults for each path, one an attempt."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What one answer does wrong. `kind`:

    stall (send `after` bytes, then nothing), cut (`after` bytes, then the connection ends), wrong (a byte is another one),
    short (all headers right for a file that ends after `after` bytes), status (`code`, with Retry-After `after`),
    no_range (the whole file, whatever was asked for), no_length (cut after `after` bytes, and no length was given),
    drip (in pieces of `after` bytes).
    """

    kind: str
    after: int = 0
    code: int = 503


@dataclass
class FaultyServer:
    """Files of `folder`; `faults[name]` are taken one a request, then all is well. `requests` counts by name."""

    folder: Path
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    choose: Callable[[str, int], Fault | None] | None = None  # instead of `faults`: by name and number of the request
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, str]] = field(default_factory=list)  # (name, Range) of the requests that had one
    logins: list[str] = field(default_factory=list)  # Authorization headers
    reached: threading.Event = field(default_factory=threading.Event)  # set when a stall begins
    over: threading.Event = field(default_factory=threading.Event)  # ends the stalls
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next_fault(self, name: str) -> Fault | None:
        with self.lock:
            number = self.requests[name]
            self.requests[name] += 1
            if self.choose:
                return self.choose(name, number)
            waiting = self.faults.get(name, [])
            return waiting.pop(0) if waiting else None


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """Serves `folder` until the block ends; its threads are gone then."""
    state = FaultyServer(folder)

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that closing waits for them
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: FaultyServer
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        state, name = self.server_state, self.path.split("?")[0].lstrip("/")
        fault = state.next_fault(name) or Fault("none")
        if login := self.headers.get("Authorization"):
            state.logins.append(login)
        path = state.folder / name
        if fault.kind == "status" or not path.is_file():
            self.send_response(fault.code if fault.kind == "status" else 404)
            if fault.kind == "status" and fault.after:
                self.send_header("Retry-After", str(fault.after))
            self.end_headers()
            return
        try:
            self._send(path.read_bytes(), fault)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client has had enough

    def _send(self, data: bytes, fault: Fault) -> None:
        asked = self.headers.get("Range", "")
        start = 0
        if asked:
            self.server_state.ranges.append((self.path.lstrip("/"), asked))
            if fault.kind != "no_range":
                start = int(asked.removeprefix("bytes=").split("-")[0])
        if start >= len(data) and asked:
            self.send_response(416)
            self.end_headers()
            return
        if fault.kind == "short":
            data = data[: max(start, fault.after)]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = data[start:]
        if fault.kind != "no_length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.kind == "wrong":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 255]) + body[len(body) // 2 + 1 :]
        if fault.kind in ("stall", "cut", "no_length"):
            body = body[: fault.after]
        for at in range(0, len(body), fault.after if fault.kind == "drip" else len(body) or 1):
            self.wfile.write(body[at : at + fault.after] if fault.kind == "drip" else body)
            self.wfile.flush()
        if fault.kind == "stall":
            self.server_state.reached.set()
            self.server_state.over.wait()
