"""An S3 server on loopback for benches: moto's, in a process of its own, behind a link of a given delay and rate.

`python -m clae_dist.bench.bucket DELAY_S BYTES_PER_S` prints the port of the link and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

from clae_dist import object_store
from clae_dist.bench.start import python_process
from clae_dist.errors import ConfigError

NAME = "clae-bench"
_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
_BLOCK = 64 << 10  # bytes
_START_S = 120.0


@contextmanager
def serve_bucket(delay_s: float, bytes_per_s: float) -> Iterator[str]:
    """The URL of a bucket, which object_store finds inside. Raises ConfigError without moto or s3fs."""
    missing = [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--bucket is given, but {' and '.join(missing)} cannot be imported; pip install 'moto[server]' s3fs, "
            "or leave --bucket away."
        )
    with tempfile.TemporaryDirectory(prefix="clae-bucket-") as folder:
        log = Path(folder) / "log"
        with python_process(["-m", "clae_dist.bench.bucket", str(delay_s), str(bytes_per_s)], log) as process:
            deadline = time.monotonic() + _START_S
            while not (lines := log.read_text().splitlines()) or not lines[-1].startswith("port "):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"moto's server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            endpoint = f"http://127.0.0.1:{lines[-1].split()[1]}"
            variables = {**_KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true", "CLAE_CACHE": folder}
            with mock.patch.dict(os.environ, variables):
                object_store._filesystem.cache_clear()
                try:
                    yield f"s3://{NAME}"
                finally:
                    object_store._filesystem.cache_clear()


class _Link:
    """Forwards connections to a port of this machine, with a delay at each answer and a rate that all bodies share."""

    def __init__(self, port: int, delay_s: float, bytes_per_s: float) -> None:
        self._port, self._delay_s, self._bytes_per_s = port, delay_s, bytes_per_s
        self._free_at = 0.0  # when the link has carried what it was given

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        with suppress(ConnectionError):
            await asyncio.gather(self._pump(reader, there_writer, 0.0), self._pump(there_reader, writer, self._delay_s))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        while block := await reader.read(_BLOCK):
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + len(block) / self._bytes_per_s
            await asyncio.sleep(max(0.0, self._free_at - now) + (delay_s if len(block) < _BLOCK else 0.0))
            writer.write(block)
            await writer.drain()
        writer.close()


async def _serve(port: int, delay_s: float, bytes_per_s: float) -> None:
    server = await asyncio.start_server(_Link(port, delay_s, bytes_per_s).forward, "127.0.0.1", 0)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main(arguments: list[str]) -> None:
    """Start moto's server with one bucket, and the link before it."""
    import logging

    import boto3  # type: ignore[import-untyped]
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket=NAME)
    asyncio.run(_serve(port, *map(float, arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
