"""Google's object storage through gcsfs: its plain HTTP client, without retries of its own, and its errors in short.

Project and payer are read from fsspec's configuration, as `FSSPEC_GS_PROJECT` and `FSSPEC_GS_REQUESTER_PAYS`. Credentials are
Google's defaults (`google.auth.default`), unless `FSSPEC_GS_TOKEN` names others, or `anon`. Buckets of the zonal kind are not
supported: they are written by gRPC, whose channels do not survive the forks of a training process.
"""

from __future__ import annotations

import inspect
import io
import os
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any

from clae_dist.redact import redact_text

UNAUTHORIZED, DENIED, INVALID, PAYS = "401", "403", "400", "requester pays"
REFRESH, CLOCK = "invalid_grant", "invalid_grant, iat and exp"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_CONNECT_S, _REQUEST_S = 10.0, 300.0
_NONE_FOUND = ("Your default credentials were not found", "Could not automatically determine credentials")
_SMALL_BYTES = 5 << 20  # gcsfs puts smaller files in one request
_BOUNDARY = b"--==0=="  # of the parts of such a request
_PERMISSION = re.compile(r"\bstorage\.\w+\.\w+\b")


class CredentialsError(PermissionError):
    """There is something in the place of credentials that cannot be read."""


def make_client(timeout_s: float, **options: Any) -> Any:
    """fsspec's file system for gs://; a request fails after `timeout_s` without a byte.

    Without credentials, the client is anonymous. Raises ImportError without gcsfs, and CredentialsError.
    """
    client = _client_class()
    import aiohttp
    import fsspec

    is_named = any("token" in fsspec.config.conf.get(name, {}) for name in client.protocol)
    credentials = None if is_named else _default_credentials()
    if not is_named:
        options["token"] = credentials or "anon"
    limits = aiohttp.ClientTimeout(total=_REQUEST_S, sock_connect=_CONNECT_S, sock_read=timeout_s)
    made = client(requests_timeout=limits, consistency="md5", **options)
    made.has_defaults = credentials is not None
    return made


def renew(client: Any) -> None:
    """Read Google's default credentials again, which may have been replaced; those of before stay if there are none."""
    with suppress(CredentialsError):
        if client.has_defaults and (credentials := _default_credentials()):
            client.credentials.credentials = credentials


def is_anonymous(client: Any) -> bool:
    """True for a client that sends no credentials."""
    return client.credentials.credentials is None


def server_time(client: Any, bucket: str) -> str:
    """The Date of an answer."""
    headers, _ = client.call("GET", "b/{}/o", bucket, maxResults=1, fields="kind")
    return str(headers["Date"])


def code_of(error: BaseException) -> str:
    """One of the codes above for a refusal; "" for other errors. The permission that is missing may follow DENIED."""
    text = str(error)
    if type(error).__name__ == "HttpError":
        return _code_of_answer(str(getattr(error, "code", "")), text, str(error.__cause__ or ""))
    if isinstance(error, OSError) and text.startswith("Forbidden"):
        permission = _PERMISSION.search(text)
        return f"{DENIED} {permission[0]}" if permission else DENIED
    if isinstance(error, ValueError) and text.startswith("Bad Request"):
        return INVALID
    return ""


def _code_of_answer(code: str, text: str, cause: str) -> str:
    if code == INVALID and "requester pays" in text.lower():
        return PAYS
    if code != UNAUTHORIZED or not cause:
        return code if code in (UNAUTHORIZED, INVALID) else ""
    if "iat and exp" in cause:
        return CLOCK
    # A token could not be had; an outage of the server of tokens passes.
    return REFRESH if "invalid_" in cause or "unauthorized_client" in cause else ""


def _default_credentials() -> Any:
    """Google's default credentials; None without any, which takes 12 s where nothing answers in the place of Google's metadata.

    Raises CredentialsError.
    """
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return google.auth.default(scopes=[_SCOPE])[0]
    except DefaultCredentialsError as error:
        text = str(error.args[0])
        if text.startswith(_NONE_FOUND):
            return None
        raise CredentialsError(f"Google's default credentials cannot be used ({redact_text(text)[:160].rstrip('.')})") from None


@lru_cache(maxsize=1)
def _client_class() -> Any:
    from gcsfs.core import GCSFileSystem

    once = inspect.unwrap(GCSFileSystem._request)

    class Client(GCSFileSystem):
        """gcsfs with one try a request, not six in a minute; callers retry, who have a deadline and can be stopped."""

        has_defaults = False  # Google's default credentials

        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(data := kwargs.get("data"), bytes):
                kwargs["data"] = io.BytesIO(data)  # is sent in pieces, with other requests between them
            return await once(self, *args, **kwargs)

        async def _pipe_file(self, path: str, data: bytes, **kwargs: Any) -> Any:
            """Put bytes. A carriage return at their end would be taken for a part of the boundary that follows."""
            if data.endswith(b"\r") or _BOUNDARY in data:
                kwargs["chunksize"] = len(data)  # an upload of its own, without boundaries
            return await super()._pipe_file(path, data, **kwargs)

        async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
            if os.path.getsize(lpath) >= _SMALL_BYTES:
                return await super()._put_file(lpath, rpath, **kwargs)
            with open(lpath, "rb") as file:
                data = file.read()
            return await self._pipe_file(rpath, data)

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
            """A file that reads a block ahead; gcsfs would prefetch in tasks that outlive it."""
            return super()._open(path, mode, **{"cache_type": "readahead", **kwargs})

    return Client
