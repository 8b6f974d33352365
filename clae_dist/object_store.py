"""Objects of a bucket through fsspec (s3fs, gcsfs): atomic puts, conditional creation, ranges, retries.

Every call is repeated with backoff until it succeeds, is refused for good, or `RETRY_S` have passed, so that throttling (503
SlowDown), errors of a server and a short outage cost time alone. What is put is checked on the way by the client's checksums.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from clae_dist import google_storage
from clae_dist.errors import STORAGE, ConfigError
from clae_dist.redact import redact_text
from clae_dist.staging import SCHEMES, url_of
from clae_dist.storage import StorageError

RETRY_S = 300.0
FIRST_TRIES_S = 5.0  # of the first call of a command, before ranks start: the user waits
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_TIMEOUT_S = 30.0  # without a byte
_BLOCK_BYTES = 16 << 20  # of a file that is put
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for every rank",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS for every rank, or FSSPEC_GS_TOKEN=anon for a bucket that takes anyone",
}
_WRONG_CREDENTIALS = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *(google_storage.UNAUTHORIZED, google_storage.REFRESH),
)
_CLOCK = ("RequestTimeTooSkewed", "RequestInTheFuture", "RequestExpired", google_storage.CLOCK)
_FINAL = (
    *("AccessDenied", "NoSuchBucket", "InvalidBucketName", "PermanentRedirect", *_WRONG_CREDENTIALS, *_CLOCK),
    *(google_storage.INVALID, google_storage.PAYS),
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # clients' errors
_ADDRESSES = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST if it is set"}
T = TypeVar("T")


class StoreError(StorageError):
    """An object store cannot be used. The text names the URL, the reason and the way out."""

    exit_code = STORAGE
    on_all_ranks = False

    def __init__(self, url: str, reason: str, way_out: str) -> None:
        super().__init__(errno.EIO, reason, url)
        self._text = f"{url} cannot be used: {reason}; {way_out}."

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._text, self.filename, self.strerror)


def _rebuilt(text: str, url: str, reason: str) -> StoreError:
    error = StoreError(url, reason, "")
    error._text = text
    return error


class NoObjectError(Exception):
    """There is no object of that name."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing; `changed` is the store's own time of its last change, as text that sorts."""

    num_bytes: int
    changed: str = ""


class Store:
    """The objects below one URL, by names relative to it. Calls may come from several threads.

    Raises: StoreError for all but a missing object.
    """

    def __init__(self, url: str, retry_s: float = 0.0) -> None:
        self.url, self._retry_s = url, retry_s or RETRY_S
        self._scheme, _, self._root = url.partition("://")

    def put(self, name: str, data: bytes | Path, check: Callable[[], None] = lambda: None) -> None:
        """Write an object; readers see the old one or the new one. `check` is called between blocks and may raise."""
        path = self._path(name)
        try:
            if isinstance(data, bytes):
                self._call(name, lambda fs: fs.pipe_file(path, data), check)
            else:
                self._call(name, lambda fs: _put_file(fs, data, path, check), check)
        except NoObjectError:  # of Google's store
            raise self._no_bucket() from None

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that must not exist; False if it does.

        After an answer that was lost, or by a store that ignores the condition, the object is read back: it is ours if it holds
        `data`, which must be unique.
        """
        path = self._path(name)
        try:
            self._call(name, lambda fs: fs.pipe_file(path, data, mode="create"))
        except NoObjectError:  # of Google's store
            raise self._no_bucket() from None
        except FileExistsError:  # of another, or ours by an earlier try
            pass
        return self.get_or(name) == data

    def get(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """An object, or its bytes start … end. Raises NoObjectError."""
        path = self._path(name)
        data: bytes = self._call(name, lambda fs: fs.cat_file(path, start=start, end=end))
        return data

    def get_or(self, name: str, default: bytes = b"") -> bytes:
        """An object, or `default` if there is none."""
        try:
            return self.get(name)
        except NoObjectError:
            return default

    def age_s(self, changed: str) -> float:
        """Seconds since the time of an Entry, by the store's own clock where it tells it."""
        bucket = self._root.partition("/")[0]
        now = self._call("", lambda fs: _now(fs, bucket))
        return max(0.0, (now - datetime.fromisoformat(changed)).total_seconds()) if changed else 0.0

    def size(self, name: str) -> int:
        """Raises NoObjectError."""
        path = self._path(name)
        return int(self._call(name, lambda fs: fs.info(path, refresh=True))["size"])

    def entries(self, prefix: str = "", beginning: str = "") -> dict[str, Entry]:
        """All objects below the folder `prefix` whose names in it begin so, by names relative to this store's URL."""
        path = self._path(prefix)

        def find(fs: Any) -> Any:
            fs.invalidate_cache()
            return fs.find(path, detail=True, prefix=beginning)

        try:
            found = self._call(prefix, find)
        except NoObjectError:
            if self._scheme == "gs":  # a listing of a bucket that is there never fails so
                raise self._no_bucket() from None
            return {}
        start = len(self._root) + 1
        return {
            name[start:]: Entry(int(info.get("size") or 0), _text(info.get("LastModified") or info.get("updated")))
            for name, info in ((path.lstrip("/"), info) for path, info in found.items())
            if name.startswith(f"{self._root}/")
        }

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects in this order; missing ones are no error."""
        for name in names:
            path = self._path(name)
            try:
                self._call(name, partial(_remove, path))
            except NoObjectError:
                continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _call(self, name: str, action: Callable[[Any], T], check: Callable[[], None] = lambda: None) -> T:
        """action(file system), with retries; what `check` raises ends them."""
        deadline, pause_s = time.monotonic() + self._retry_s, _FIRST_PAUSE_S
        where = f"{self.url}/{name}" if name and not name.startswith(".") else self.url
        renewed = False
        while True:
            check()
            try:
                return action(_filesystem(self._scheme, os.getpid()))
            except (FileExistsError, ConfigError, StoreError):
                raise
            except _StoppedError:
                continue  # `check` raises again
            except Exception as error:
                code = _code(error)
                if _is_missing(error, code):
                    raise NoObjectError(where) from None
                if code == google_storage.UNAUTHORIZED and not renewed:  # the token may have been revoked
                    google_storage.renew(_filesystem(self._scheme, os.getpid()))
                    renewed = True
                    continue
                if _is_final(error, code):
                    raise self._error(where, error, code) from None
                if time.monotonic() + pause_s > deadline:
                    raise self._error(where, error, code) from None
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _is_anonymous(self) -> bool:
        return google_storage.is_anonymous(_filesystem(self._scheme, os.getpid()))

    def _no_bucket(self) -> StoreError:
        return self._error(self.url, FileNotFoundError(), "NoSuchBucket")

    def _error(self, where: str, error: Exception, code: str) -> StoreError:
        """The error in words; none of a client's own texts, which may hold keys."""
        reason = " ".join(redact_text(str(error)).split())[:160] or type(error).__name__
        if code in _CLOCK:
            return StoreError(where, f"the store refuses requests of this machine's clock ({code})", "set the clock (NTP)")
        if type(error).__name__ in _NO_CREDENTIALS or (code == google_storage.UNAUTHORIZED and self._is_anonymous()):
            return StoreError(where, "there are no credentials", _CREDENTIALS[self._scheme])
        if isinstance(error, google_storage.CredentialsError):
            return StoreError(where, str(error), "set GOOGLE_APPLICATION_CREDENTIALS to a file of this machine, for every rank")
        if code in _WRONG_CREDENTIALS:
            return StoreError(where, f"the credentials are not accepted ({code})", _CREDENTIALS[self._scheme])
        if code == "NoSuchBucket":
            return StoreError(where, "there is no such bucket", "create it, or correct run_dir")
        if code == google_storage.PAYS:
            return StoreError(where, "the requester pays for this bucket", "name your project in FSSPEC_GS_REQUESTER_PAYS")
        if isinstance(error, PermissionError) or code.startswith(google_storage.DENIED):
            way_out = "allow getting, putting, listing and deleting objects there, or give another run_dir"
            return StoreError(where, f"access is denied{f' ({code})' if code else ''}", way_out)
        if code == google_storage.INVALID:
            return StoreError(where, f"the store refuses the request ({reason})", "correct the name, or give another run_dir")
        return StoreError(where, reason, f"check the network and {_ADDRESSES[self._scheme]}")


def store_of(folder: Path, retry_s: float = 0.0) -> Store | None:
    """The store of a staged folder, None for an ordinary one."""
    url = url_of(folder)
    return Store(url, retry_s) if url else None


def check_store(folder: Path, retry_s: float = 0.0) -> None:
    """Check that objects can be written, listed, read and deleted where `folder` is staged; nothing for an ordinary folder.

    Raises StoreError, and ConfigError for a client that is not installed.
    """
    store = store_of(folder, retry_s or FIRST_TRIES_S)
    if store is None:
        return
    name = f".probe-{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
    store.put(name, b"clae")
    try:
        store.entries()
        back = store.get_or(name)
    finally:
        store.delete([name])
    if back != b"clae":
        raise StoreError(store.url, "an object that was written cannot be read back", "use a store with strong consistency")


@lru_cache(maxsize=4)
def _filesystem(scheme: str, pid: int) -> Any:
    """fsspec's file system of this process: its connections do not survive a fork."""
    assert scheme in SCHEMES, scheme
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if scheme == "gs":
            return google_storage.make_client(_TIMEOUT_S, **options)
        config = {"connect_timeout": 10, "read_timeout": _TIMEOUT_S, "retries": {"max_attempts": 1, "mode": "standard"}}
        return fsspec.filesystem(scheme, **options, config_kwargs={**config, "max_pool_connections": 32})
    except ImportError:
        package = _PACKAGES[scheme]
        raise ConfigError(
            f"run_dir is a {scheme}:// URL, which needs a package that is not installed; pip install {package}."
        ) from None


class _StoppedError(Exception):
    """An upload was stopped between two blocks."""


def _put_file(fs: Any, data: Path, path: str, check: Callable[[], None]) -> None:
    """Put a file in blocks. Raises _StoppedError when `check` raises."""
    from fsspec.callbacks import Callback

    class Check(Callback):
        def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # after every block, by either client
            try:
                check()
            except Exception:
                raise _StoppedError from None

    fs.put_file(str(data), path, chunksize=_BLOCK_BYTES, callback=Check())


def _now(fs: Any, bucket: str) -> datetime:
    if hasattr(fs, "call_s3"):
        answer = fs.call_s3("head_bucket", Bucket=bucket)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return parsedate_to_datetime(google_storage.server_time(fs, bucket))


def _remove(path: str, fs: Any) -> None:
    fs.rm_file(path)


def _code(error: BaseException | None) -> str:
    """The code of the store's answer, such as AccessDenied, or ""."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if code := google_storage.code_of(error):
            return code
        error = error.__cause__
    return ""


def _is_missing(error: Exception, code: str) -> bool:
    return isinstance(error, FileNotFoundError) and code != "NoSuchBucket"


def _is_final(error: Exception, code: str) -> bool:
    kind = type(error).__name__
    refused = code in _FINAL or code.startswith(google_storage.DENIED) or isinstance(error, PermissionError)
    return refused or kind in (*_NO_CREDENTIALS, "ParamValidationError")


def _text(moment: Any) -> str:
    return moment.isoformat() if hasattr(moment, "isoformat") else str(moment or "")
