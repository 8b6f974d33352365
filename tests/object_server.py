"""An S3 server (moto's), and a proxy before it that slows down, fails and cuts as a test tells it."""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "clae-test"
KEY_ID, SECRET = "AKIACANARYKEYID00000", "canary-secret-access-key"


@dataclass(frozen=True)
class Request:
    """One request to the store; `number` counts them."""

    number: int
    method: str
    path: str


@dataclass
class Faults:
    """Faults of the proxy. `choose` names a fault by the request: "" none, "500", "503" (SlowDown), "cut" (the answer's body is
    cut in the middle), "lost" (the request is carried out and its answer is lost), "reset" (it is not carried out), or the code
    of a refusal, such as AccessDenied.
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


@dataclass
class ObjectServer:
    """The address through the proxy, and the server itself."""

    port: int
    faults: Faults
    client: Any  # boto3's, past the proxy
    address: str = "127.0.0.1"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which s3fs finds the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects in the bucket."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        with self.client.get_object(Bucket=BUCKET, Key=key)["Body"] as body:
            data: bytes = body.read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def clear(self) -> None:
        """Delete all objects and forget all faults."""
        for key in self.names():
            self.delete(key)
        self.faults.choose, self.faults.latency_s, self.faults.bytes_per_s = (lambda request: ""), 0.0, 0.0
        self.faults.requests.clear()


@contextmanager
def serve_objects(address: str = "127.0.0.1") -> Iterator[ObjectServer]:
    """A server with one bucket, whose proxy listens on `address`, until the block ends."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, direct_port = moto.get_host_and_port()
    faults = Faults()

    methods = {f"do_{name}": _Proxy._forward for name in ("GET", "PUT", "POST", "DELETE", "HEAD")}
    handler = type("Handler", (_Proxy,), {"upstream": direct_port, "state": faults, **methods})
    proxy = _Server((address, 0), handler)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{direct_port}", **keys)
    server = ObjectServer(proxy.server_port, faults, client, address)
    client.create_bucket(Bucket=BUCKET)
    try:
        yield server
    finally:
        client.close()
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        moto.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Proxy(BaseHTTPRequestHandler):
    upstream: int
    state: Faults
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def _forward(self) -> None:
        state = self.state
        with state.lock:
            request = Request(len(state.requests), self.command, self.path)
            state.requests.append(request)
        fault = state.choose(request)
        time.sleep(state.latency_s * random.uniform(0.5, 1.5))
        body = self._body()
        if fault == "reset":
            self.close_connection = True
            return
        if fault not in ("", "cut", "lost"):
            status, code = {"500": (500, "InternalError"), "503": (503, "SlowDown")}.get(fault, (403, fault))
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{KEY_ID} planted</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], text)
            return
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("connection", "transfer-encoding")}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)) as connection:
            connection.request(self.command, self.path, body, {**headers, "Connection": "close"})
            with connection.getresponse() as answer:
                data, given = answer.read(), answer.getheaders()
        kept = [(key, value) for key, value in given if key.lower() not in ("connection", "transfer-encoding")]
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, kept, data, cut=fault == "cut")

    def _body(self) -> bytes:
        """The body of the request, over the link."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.state.carry(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue
            return data
        left, data = int(self.headers.get("Content-Length") or 0), b""
        while left:
            block = self.rfile.read(min(left, 256 << 10))
            if not block:
                break
            left -= len(block)
            data += block
            self.state.carry(len(block))
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
            for start in range(0, len(data) // 2 if cut else len(data), 256 << 10):
                block = data[start : start + (256 << 10)] if not cut else data[start : min(start + (256 << 10), len(data) // 2)]
                self.state.carry(len(block))
                self.wfile.write(block)
            if cut:
                self.close_connection = True
