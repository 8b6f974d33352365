"""A server of Google's storage API on loopback (gcp-storage-emulator), and what the proxy before it adds of the real one.

Added are creation on a condition (ifGenerationMatch=0), the end of an upload session, multipart bodies read to the byte as
RFC 2046 has it (the emulator takes them for e-mail), and Google's errors in JSON.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.fault_proxy import Answer, Faults, Proxy, ask, proxied
from tests.object_server import BUCKET, SECRET, ObjectServer

_OBJECTS = f"/storage/v1/b/{BUCKET}/o"
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?")
_ERRORS = {
    "500": (500, "Backend Error"),
    "503": (503, "We encountered an internal error. Please try again."),
    "429": (429, "The object exceeded the rate limit for object mutation operations."),
    "denied": (403, f"{SECRET} does not have storage.objects.create access to the Google Cloud Storage object."),
    "unauthorized": (401, f"Invalid Credentials {SECRET}"),
    "anonymous": (401, "Anonymous caller does not have storage.objects.create access to the Google Cloud Storage object."),
    "requester pays": (400, "Bucket is a requester pays bucket but no user project provided."),
    "invalid": (400, "The specified bucket name is invalid."),
}


class GoogleServer(ObjectServer):
    scheme = "gs"
    direct_port = 0

    @property
    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}", "FSSPEC_GS_TOKEN": "anon"}

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        status, _, data = ask(self.direct_port, method, path, body, {"Content-Type": "application/octet-stream"})
        assert status < 300, (method, path, status)
        return data

    def names(self, prefix: str = "") -> list[str]:
        items = json.loads(self._ask("GET", f"{_OBJECTS}?{urlencode({'prefix': prefix})}"))["items"]
        return [item["name"] for item in items]

    def read(self, key: str) -> bytes:
        return self._ask("GET", f"/download{_OBJECTS}/{quote(key, safe='')}")

    def write(self, key: str, data: bytes) -> None:
        self._ask("POST", f"/upload{_OBJECTS}?{urlencode({'uploadType': 'media', 'name': key})}", data)

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"{_OBJECTS}/{quote(key, safe='')}")


@contextmanager
def serve_google() -> Iterator[ObjectServer]:
    """A server with one bucket, until the block ends."""
    from gcp_storage_emulator.server import create_server

    for name in ("gcp_storage_emulator", "api.object", "api.bucket"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    emulator._storage.buckets[BUCKET]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}  # or all is kept for days
    emulator.start()
    try:
        direct_port, faults = emulator._api._httpd.server_address[1], Faults()
        with proxied(direct_port, _GoogleProxy, faults) as port:
            server = GoogleServer(port, faults)
            server.direct_port = direct_port
            yield server
    finally:
        emulator.stop()


class _GoogleProxy(Proxy):
    one = threading.Lock()  # a condition and what depends on it are one

    def meaning(self, body: bytes) -> tuple[str, str]:
        path, query = self._parts()
        if path.startswith("/upload"):
            if query.get("uploadType") == "multipart":
                return "put", self._parts_of(body)[0]["name"]
            action = "delete" if self.command == "DELETE" else "put" if "upload_id" in query else "begin"
            return action, query["name"]
        match = _OBJECT.fullmatch(path)
        if match is None or match[2] is None:
            return "list", query.get("prefix", "")
        action = "get" if path.startswith("/download") else {"GET": "head"}.get(self.command, self.command.lower())
        return action, unquote(match[2])

    def planted(self, fault: str) -> Answer:
        status, message = _ERRORS[fault]
        return _error(status, message)

    def carry_out(self, body: bytes) -> Answer:
        path, query = self._parts()
        if self.command == "DELETE" and "upload_id" in query:
            return 499, [], b""
        with self.one:
            _, key = self.meaning(body)
            if query.get("ifGenerationMatch") == "0" and self._exists(path, key):
                return _error(412, "At least one of the pre-conditions you specified did not hold.")
            data = self._parts_of(body)[1] if query.get("uploadType") == "multipart" else b""
            if data:
                target = f"{path}?{urlencode({'uploadType': 'media', 'name': key})}"
                return ask(self.upstream, "POST", target, data, {"Content-Type": "application/octet-stream"})
            return super().carry_out(body)

    def _parts(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}

    def _exists(self, path: str, key: str) -> bool:
        where = path.removeprefix("/upload")
        return ask(self.upstream, "GET", f"{where}/{quote(key, safe='')}", b"", {})[0] == 200

    def _parts_of(self, body: bytes) -> tuple[Any, bytes]:
        """The metadata and the data of an upload in one request."""
        boundary = re.escape(self.headers.get_boundary("").encode())
        _, first, second, *_ = re.split(rb"(?:^|\r?\n)--%s(?:--)?" % boundary, body)
        return json.loads(_content(first)), _content(second)


def _content(part: bytes) -> bytes:
    """A part without its headers."""
    return re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]


def _error(status: int, message: str) -> Answer:
    text = json.dumps({"error": {"code": status, "message": message, "errors": [{"domain": "global", "message": message}]}})
    return status, [("Content-Type", "application/json")], text.encode()
