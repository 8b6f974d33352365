"""Google's storage with the real client (gcsfs) before an emulator: bytes, listings, stops, forks and credentials."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from clae_dist import object_store
from clae_dist.object_store import Store, StoreError, check_store
from clae_dist.staging import staging_folder
from tests.object_server import ON_BOTH, ON_GOOGLE, SECRET, ObjectServer

TOKEN = "ya29.canary-token-of-a-service-account"


@ON_BOTH
def test_bytes_come_back_as_they_were_put(bucket: ObjectServer, tmp_path: Path) -> None:
    """As bytes, as a file and when created. gcsfs divides the parts of a request by a constant, and by LF alone."""
    store, path = Store(bucket.url, 2.0), tmp_path / "file"
    texts = [b"", b"\r", b"a\r\nb\n\r\n", b"x\n--==0==--\r\ny", b"x\n--==0==\ny", bytes(range(256)), b"ends with it\r"]
    for number, data in enumerate(texts):
        path.write_bytes(data)
        store.put("bytes", data)
        store.put("file", path)
        assert [store.get("bytes"), store.get("file"), store.size("file")] == [data, data, len(data)]
        assert store.create(f"new-{number}", data)
    assert {name: entry.num_bytes for name, entry in store.entries().items() if name.startswith("new")} == {
        f"new-{number}": len(data) for number, data in enumerate(texts)
    }


@ON_BOTH
def test_names_are_taken_as_they_are(bucket: ObjectServer) -> None:
    store = Store(f"{bucket.url}/a b", 2.0)
    names = ["x y", "100%25", "a+b&c=d", "ü", "{0}", "a/b/c", "a"]
    for name in names:
        store.put(name, name.encode())
    assert sorted(store.entries()) == sorted(names)
    assert [store.get(name).decode() for name in names] == names
    assert "a/b/c" in store.entries("a")
    assert "a b" not in store.entries("a")
    store.delete([*names, "absent"])
    assert bucket.names() == []


@ON_BOTH
def test_listings_are_never_stale(bucket: ObjectServer) -> None:
    """As others change what this process has listed, written and asked for."""
    store = Store(bucket.url, 2.0)
    store.put("a", b"1")
    first = store.entries()["a"]
    bucket.write("runs/first/b", b"22")
    assert set(store.entries()) == {"a", "b"}
    bucket.write("runs/first/a", b"333")
    assert (store.size("a"), store.get("a"), store.entries()["a"].num_bytes) == (3, b"333", 3)
    bucket.delete("runs/first/a")
    assert set(store.entries()) == {"b"}
    assert store.get_or("a", b"gone") == b"gone"
    assert 0 <= store.age_s(first.changed) < 300


@ON_GOOGLE
def test_an_upload_is_stopped_between_two_blocks(bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def check() -> None:
        if sum(request.action == "put" for request in bucket.faults.requests) == 2:
            raise Stop

    monkeypatch.setattr(object_store, "_BLOCK_BYTES", 1 << 20)
    path, store = tmp_path / "file", Store(bucket.url, 5.0)
    path.write_bytes(os.urandom(6 << 20))
    with pytest.raises(Stop):
        store.put("file", path, check)
    assert [request.action for request in bucket.faults.requests] == ["begin", "put", "put", "delete"]
    assert bucket.names() == []
    store.put("file", path)
    assert store.get("file") == path.read_bytes()


@ON_GOOGLE
def test_a_forked_process_has_connections_of_its_own(bucket: ObjectServer) -> None:
    store = Store(bucket.url, 5.0)
    store.put("parent", b"1")
    child = os.fork()
    if child == 0:
        store.put("child", store.get("parent"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("child") == b"1"


# ---- what cannot be used ----


@ON_GOOGLE
def test_a_bucket_that_is_not_there_is_not_an_empty_one(bucket: ObjectServer) -> None:
    store = Store("gs://no-such-bucket/run", 1.0)
    for action in (store.entries, lambda: store.create("x", b"1"), lambda: store.put("x", b"1")):
        with pytest.raises(StoreError, match="gs://no-such-bucket/run cannot be used: there is no such bucket; create it"):
            action()


@ON_GOOGLE
def test_an_address_without_a_server_is_named(bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://me:{SECRET}@127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(
            StoreError, match="Cannot connect to host .*; check the network and STORAGE_EMULATOR_HOST"
        ) as raised:
            Store(bucket.url, 0.2).put("x", b"1")
    assert SECRET not in str(raised.value)


@dataclass
class Tokens:
    """A server that gives tokens: `answers` are taken one a request, then tokens of increasing numbers."""

    url: str = ""
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    given: list[str] = field(default_factory=list)


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    state = Tokens()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if state.answers:
                status, content = state.answers.pop(0)
            else:
                state.given.append(f"{TOKEN}-{len(state.given)}")
                status, content = 200, {"access_token": state.given[-1], "expires_in": 3600, "token_type": "Bearer"}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/token"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def account(tokens: Tokens, bucket: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a service account, which the environment names in the place of `anon`."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    content = {"type": "service_account", "client_email": "me@project.iam", "token_uri": tokens.url, "private_key": text}
    path = tmp_path / "account.json"
    path.write_text(json.dumps({**content, "private_key_id": "1", "project_id": "project", "client_id": "1"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setattr(fsspec.config, "conf", {})
    return path


@ON_GOOGLE
def test_a_token_that_was_revoked_is_renewed_once(bucket: ObjectServer, account: Path, tokens: Tokens) -> None:
    store = Store(bucket.url, 5.0)
    store.put("a", b"1")
    bucket.faults.choose = lambda request: "unauthorized" if request.login.endswith("-0") else ""
    store.put("b", b"2")
    assert [request.login for request in bucket.faults.requests] == [f"Bearer {TOKEN}-{number}" for number in (0, 0, 1)]
    bucket.faults.choose = lambda request: "unauthorized"
    with pytest.raises(StoreError, match=r"the credentials are not accepted \(401\); set GOOGLE_APPLICATION") as raised:
        store.put("c", b"3")
    assert "canary" not in str(raised.value)


@ON_GOOGLE
def test_refusals_of_tokens(bucket: ObjectServer, account: Path, tokens: Tokens) -> None:
    """Of the account, of this machine's clock, and those that pass."""
    store = Store(bucket.url, 5.0)
    description = (
        "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. Check your iat and exp"
    )
    cases = [
        (
            {"error": "invalid_grant", "error_description": "Invalid grant: account not found"},
            r"not accepted \(invalid_grant\)",
        ),
        ({"error": "invalid_grant", "error_description": description}, "refuses requests of this machine's clock"),
    ]
    for content, words in cases:
        tokens.answers = [(400, content)] * 8
        with pytest.raises(StoreError, match=words):
            store.put("a", b"1")
    tokens.answers = [(503, {"error": "unavailable"})]
    store.put("a", b"1")
    assert store.get("a") == b"1"


@ON_GOOGLE
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"Google's default credentials cannot be used \(File /.*account.json was not found"),
        ("{", r"Google's default credentials cannot be used \(File /.*account.json is not a valid json file\); set GOOGLE"),
        ('{"type": "service_account", "private_key": "canary"}', r"Google's default credentials cannot be used"),
    ],
    ids=["no file", "no JSON", "no account"],
)
def test_a_file_without_credentials_is_named(content: str | None, words: str, bucket: ObjectServer, account: Path) -> None:
    account.unlink() if content is None else account.write_text(content)
    with pytest.raises(StoreError, match=words) as raised:
        check_store(staging_folder(bucket.url))
    assert "canary" not in str(raised.value)


@ON_GOOGLE
@pytest.mark.slow
def test_a_machine_without_credentials_says_so_in_seconds(
    bucket: ObjectServer, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing answers at the address of Google's metadata. gcsfs alone takes 42 s, and is anonymous then."""
    bucket.faults.choose = lambda request: "" if request.login else "anonymous"
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        from google.auth.compute_engine import _metadata

        monkeypatch.setattr(_metadata, "_get_metadata_ip_root", lambda use_mtls: f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(StoreError, match="there are no credentials; set GOOGLE_APPLICATION_CREDENTIALS"):
            check_store(staging_folder(bucket.url))
    assert time.monotonic() - begin < 25  # three pings of 3 s, and pauses
