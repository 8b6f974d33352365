"""Byte streams of any URL: http(s) with ranges, pipes through WebDataset, everything else through fsspec.

Every stream raises TimeoutError if no byte arrives for `timeout_s`, whatever the server or the command does.
"""

from __future__ import annotations

import base64
import netrc
import os
import queue
import select
import signal
import subprocess
import threading
import urllib.request
from functools import lru_cache
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from clae_dist import google_storage
from clae_dist.data.urls import PIPE, scheme
from clae_dist.errors import DataError

CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20  # of one request by fsspec
_STALL_S = 60.0  # of a request whose reader has left
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}


class ByteStream(Protocol):
    """Bytes from `start` on. `total` is the size of the complete file, if known; `validator` its version."""

    start: int
    total: int | None
    validator: str

    def read(self) -> bytes:
        """The next bytes; b"" at the end. Raises OSError or HTTPException for errors that a retry may fix."""

    def close(self) -> None:
        """Close the connection or end the command, also before the end of the stream."""


def open_stream(url: str, start: int, validator: str, timeout_s: float) -> ByteStream:
    """Open `url` from byte `start`, or from 0 if the server has no ranges or the file no longer matches `validator`."""
    kind = scheme(url)
    if kind in ("http", "https"):
        return _Http(url, start, validator, timeout_s)
    return _Pipe(url, timeout_s) if kind == "pipe" else _Fsspec(url, start, timeout_s)


class _Http:
    def __init__(self, url: str, start: int, validator: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")  # urllib takes ASCII alone
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, path=path, fragment="")))
        login = unquote(user) or _login_of(parts.hostname or "")
        if login:  # not sent to the target of a redirect
            request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        if start:
            request.add_header("Range", f"bytes={start}-")
            if validator:
                request.add_header("If-Range", validator)
        try:
            self._response = urllib.request.urlopen(request, timeout=timeout_s)
        except HTTPError as error:
            error.close()  # its response keeps a connection open
            raise
        headers = self._response.headers
        # A server may send the complete file, or another part than the requested one, which is useless.
        partial = self._response.status == 206 and headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if self._response.status == 206 and not partial:
            self._response.close()
            raise OSError(f"requested bytes {start}-, the server sent {headers.get('Content-Range', 'another part')}")
        self.start = start if partial else 0
        length = headers.get("Content-Length", "")
        self.total = self.start + int(length) if length.isdigit() else None
        etag = headers.get("ETag", "")
        self.validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")

    def read(self) -> bytes:
        data: bytes = self._response.read1(CHUNK_BYTES)
        return data

    def close(self) -> None:
        self._response.close()


def _login_of(host: str) -> str:
    """user:password of a host in ~/.netrc, where there is one."""
    try:
        found = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


# Runs in the command's shell before the command: in the background, wait for the end of the shell's input, which only the
# reading process keeps open, then kill the group. A command that writes nothing would not notice the end of its reader.
_ENDS_WITH_ITS_READER = """\
exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL 0; } >/dev/null 2>&1 &
exec 3<&-
"""


class _Pipe:
    def __init__(self, url: str, timeout_s: float) -> None:
        self.start = 0
        self.total: int | None = None
        self.validator = ""
        from webdataset.gopen import Pipe

        # A group of its own, so that all of a pipeline can be ended.
        command, pipe = _ENDS_WITH_ITS_READER + url.removeprefix(PIPE), subprocess.PIPE
        self._pipe = Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True, stdin=pipe)
        self._process, self._output = self._pipe.proc, self._pipe.stream
        self._timeout_s = timeout_s

    def read(self) -> bytes:
        poll = select.poll()
        poll.register(self._output, select.POLLIN | select.POLLHUP)
        if not poll.poll(1000 * self._timeout_s):
            raise TimeoutError
        data = os.read(self._output.fileno(), CHUNK_BYTES)
        if not data:
            try:
                status = self._process.wait(self._timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            if status:
                raise OSError(f"the command ended with status {status}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdin.close()
        self._output.close()


class _Fsspec:
    """Reads in a thread of its own, because not every store's client has a timeout."""

    def __init__(self, url: str, start: int, timeout_s: float) -> None:
        self.start, self.validator, self._timeout_s = start, "", timeout_s
        self._came: queue.Queue[Any] = queue.Queue(2)  # the size, then blocks, or an exception
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=_filesystem(url), daemon=True).start()
        self.total: int | None = self._take()

    def _run(self, filesystem: Any, path: str) -> None:
        try:
            with filesystem.open(path, "rb", block_size=_BLOCK_BYTES) as file:
                file.seek(self.start)
                self._came.put(getattr(file, "size", None))
                while not self._closed.is_set():
                    data = file.read(CHUNK_BYTES)
                    self._came.put(data)
                    if not data:
                        return
        except Exception as error:  # handed to the reader
            self._came.put(error)

    def _take(self) -> Any:
        try:
            value = self._came.get(timeout=self._timeout_s)
        except queue.Empty:
            self._closed.set()
            raise TimeoutError from None
        if isinstance(value, Exception) and google_storage.code_of(value):  # refused, whatever a retry does
            raise PermissionError(str(value).rpartition("\n")[2]) from value
        if isinstance(value, OSError):
            raise value
        if isinstance(value, Exception):  # clients have errors of their own; a retry may fix any of them
            raise OSError(f"{type(value).__name__}: {value}") from value
        return value

    def read(self) -> bytes:
        data: bytes = self._take()
        return data

    def close(self) -> None:
        self._closed.set()
        while not self._came.empty():  # a full queue would block the thread
            self._came.get_nowait()


@lru_cache(maxsize=1)
def _google(pid: int) -> Any:
    """The client of this process: its connections do not survive a fork."""
    return google_storage.make_client(_STALL_S, skip_instance_cache=True)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises DataError if it is unknown or not installed."""
    import fsspec

    kind = scheme(url)
    try:
        if kind in ("gs", "gcs"):
            return _google(os.getpid()), url.partition("://")[2]
        filesystem, path = fsspec.core.url_to_fs(url)
        return filesystem, path
    except ImportError as error:
        package = _PACKAGES.get(kind, "")
        way_out = f"pip install {package}" if package else f"fsspec: {error}"
        raise DataError(f"data.shards has {kind}:// URLs, which need a package that is not installed; {way_out}.") from None
    except ValueError as error:
        raise DataError(
            f"data.shards has {kind}:// URLs, which fsspec cannot open ({error}); use http(s)://, s3:// or gs://."
        ) from None
