"""Object stores on this machine, each behind a proxy with faults; here, an S3 server (moto's)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.fault_proxy import Answer, Faults, Proxy, proxied

BUCKET = "clae-test"
ON_BOTH = pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
ON_BOTH_LONG = pytest.mark.parametrize("bucket", ["s3", pytest.param("gs", marks=pytest.mark.long)], indirect=True)
ON_GOOGLE = pytest.mark.parametrize("bucket", ["gs"], indirect=True)
KEY_ID, SECRET = "AKIACANARYKEYID00000", "canary-secret-access-key"


@dataclass
class ObjectServer:
    """A store with one bucket, by the address of its proxy; the methods reach it past the proxy."""

    scheme: ClassVar[str]
    port: int
    faults: Faults

    @property
    def url(self) -> str:
        """The URL of the run that tests write."""
        return f"{self.scheme}://{BUCKET}/runs/first"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a client finds the server."""
        raise NotImplementedError

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects in the bucket."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, key: str) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        """Delete all objects and forget all faults."""
        for key in self.names():
            self.delete(key)
        self.faults.choose, self.faults.latency_s, self.faults.bytes_per_s = (lambda request: ""), 0.0, 0.0
        self.faults.requests.clear()


@dataclass
class S3Server(ObjectServer):
    scheme = "s3"
    client: Any  # boto3's
    address: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def names(self, prefix: str = "") -> list[str]:
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


@contextmanager
def serve_s3(address: str = "127.0.0.1") -> Iterator[ObjectServer]:
    """A server with one bucket, which listens on `address`, until the block ends."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, direct_port = moto.get_host_and_port()
    keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client, faults = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{direct_port}", **keys), Faults()
    client.create_bucket(Bucket=BUCKET)
    try:
        with proxied(direct_port, _S3Proxy, faults, address) as port:
            yield S3Server(port, faults, client, address)
    finally:
        client.close()
        moto.stop()


class _S3Proxy(Proxy):
    def meaning(self, body: bytes) -> tuple[str, str]:
        parts = urlsplit(self.path)
        key, query = unquote(parts.path.lstrip("/")).partition("/")[2], parse_qs(parts.query, keep_blank_values=True)
        if "list-type" in query:
            return "list", query.get("prefix", [""])[0]
        return "begin" if "uploads" in query else self.command.lower(), key

    def planted(self, fault: str) -> Answer:
        status, code = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "429": (503, "SlowDown")}.get(
            fault, (403, fault)
        )
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{KEY_ID} planted</Message></Error>"
        return status, [("Content-Type", "application/xml")], text.encode()
