"""MLflow as a team runs it: a server with PostgreSQL behind it, on loopback and free ports; and a proxy that misbehaves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

PASSWORD = "canary-database-password"


def binaries() -> Path | None:
    """PostgreSQL's programs, where they are installed."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").is_file()), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(ready: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


class Postgres:
    """A database server in a folder of its own, under a user that is not root: PostgreSQL refuses to be root's."""

    def __init__(self, folder: Path) -> None:
        place = binaries()
        assert place is not None
        self._bin, self._data, self.port = place, folder / "data", free_port()
        self._user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(folder, "nobody", "nogroup")
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        make = [place / "initdb", "-D", self._data, "-U", "clae", "-A", "scram-sha-256", "-N", f"--pwfile={folder}/password"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **self._user)  # type: ignore[call-overload]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"postgresql://clae:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = ["listen_addresses=127.0.0.1", f"unix_socket_directories={self._data}", "fsync=off", "max_connections=50"]
        command = [self._bin / "postgres", "-D", self._data, "-p", str(self.port), *(x for s in settings for x in ("-c", s))]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self._data}
        self._process = subprocess.Popen(command, **quiet, **self._user)  # type: ignore[call-overload]
        wait_for(self._answers, "PostgreSQL")

    def _answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """At once: connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None


class Server:
    """`mlflow server` over a database."""

    def __init__(self, folder: Path, backend: str) -> None:
        self._folder, self._backend, self.port = folder, backend, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._backend, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1", "--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._folder, env=environment, start_new_session=True
            )
        wait_for(self._answers, "mlflow server")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


Mode = Literal["through", "refuse", "stall", "full"]
_FULL = b'{"error_code": "INTERNAL_ERROR", "message": "No space left on device"}'


class Proxy:
    """Hands connections on to `port`, unless it is told to refuse or to hold them, or to answer that the disk is full."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.mode: Mode = "through"
        self.asked = 0  # connections since the mode was set
        self.received = bytearray()  # all that clients have sent through
        self._released = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def set(self, mode: Mode) -> None:
        self.asked, self.mode = 0, mode
        self._released.set()
        self._released = threading.Event()

    def close(self) -> None:
        self.set("refuse")
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(20)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client, self._released), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, released: threading.Event) -> None:
        mode = self.mode
        self.asked += 1
        with client, contextlib.suppress(OSError):
            if mode == "stall":
                released.wait(60)
            elif mode == "full":
                client.recv(1 << 16)
                head = f"HTTP/1.1 500 Internal Server Error\r\nContent-Length: {len(_FULL)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + _FULL)
            elif mode == "through":
                with socket.create_connection(("127.0.0.1", self._target), 5) as server:
                    back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                    back.start()
                    _pump(client, server, released, self.received)
                    back.join(5)


def _pump(
    source: socket.socket, target: socket.socket, until: threading.Event | None = None, copy: bytearray | None = None
) -> None:
    source.settimeout(0.1)
    with contextlib.suppress(OSError):
        while until is None or not until.is_set():
            try:
                data = source.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                break
            if copy is not None:
                copy += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR if until is None or not until.is_set() else socket.SHUT_RDWR)


@contextmanager
def team_server() -> Iterator[tuple[Postgres, Server]]:
    """A database and a server that has made its tables."""
    folder = Path(tempfile.mkdtemp(prefix="clae-mlflow-"))
    folder.chmod(0o755)
    database_folder = folder / "postgres"
    database_folder.mkdir()
    database = Postgres(database_folder)
    server = Server(folder, database.uri.replace("://", "+psycopg2://"))  # the driver that the tests install
    try:
        database.start()
        server.start()
        yield database, server
    finally:
        server.kill()
        database.stop()
        shutil.rmtree(folder)
