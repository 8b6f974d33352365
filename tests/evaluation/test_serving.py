"""`mlflow models serve` of a promoted model, asked by strangers; and the limits that its requests have."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clae_dist.cli import main
from clae_dist.data.images import open_dataset
from clae_dist.deploy import serving
from clae_dist.deploy.embedding import embed
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.layout import Contents
from clae_dist.deploy.serving import Service
from clae_dist.errors import OK, ConfigError, DataError
from tests.mlflow_server import free_port, wait_for

MakeRun = Callable[..., Path]


def photos() -> list[Path]:
    """Two photographs that scikit-learn brings along."""
    from sklearn import datasets

    return sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def service(make_run: MakeRun, tmp_path: Path) -> Service:
    (tmp_path / "images").mkdir()
    return Service(export_encoder(make_run(), contents=Contents(head=True)), str(tmp_path / "images"))


def test_answers_are_those_of_clae_embed(service: Service, labelled_shards: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in photos()]
    (tmp_path / "images" / "one.jpg").write_bytes(data[0])
    answers = service.answer([{"image": one} for one in data])
    expected = embed(list(map(str, photos())), load_encoder(tmp_path / "run" / "export"), num_workers=0)
    torch.testing.assert_close(torch.tensor([one["embedding"] for one in answers]), torch.from_numpy(expected))
    assert {one["class"] for one in answers} <= {"blue", "green", "red"}
    assert all(1 / 3 <= one["probability"] <= 1 for one in answers)
    by_path = service.answer([{"image": float("nan"), "path": "one.jpg"}])
    torch.testing.assert_close(torch.tensor(by_path[0]["embedding"]), torch.tensor(answers[0]["embedding"]))
    run_set = open_dataset(labelled_shards, "test")
    rows = [{"image": png(np.asarray(image))} for image, _, _ in run_set]
    names = [run_set.classes[label] for _, label, _ in run_set]
    right = [answer["class"] == name for answer, name in zip(service.answer(rows), names, strict=True)]
    assert sum(right) >= 27  # of 30


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "neither image nor path"),
        ({"image": b"a", "path": "b"}, "it has image and path; give one of them"),
        ({"image": b""}, r"the file is empty \(0 bytes\)"),
        ({"image": "text"}, "image is str; give the bytes"),
        ({"image": b"MZ no image"}, "not an image of a format that is read"),
        ({"image": photos()[0].read_bytes()[:9000]}, "cannot be decoded|truncated"),
        ({"image": b"\x89PNG\r\n\x1a\n" + bytes(33 << 20)}, "34,603,016 bytes, more than"),
        ({"image": png(np.zeros((8000, 8000), np.uint8))}, "8000x8000 pixels, more than 50,000,000"),
        ({"path": 3}, "path is int; give a text"),
        ({"path": "/etc/hostname"}, "is no readable file"),
        ({"path": "../run/export/config.json"}, "is no readable file"),
        ({"path": "out"}, "is no readable file"),
        ({"path": "pipe"}, "is no readable file"),
        ({"path": "."}, "is no readable file"),
        ({"path": "a\0b"}, "is no readable file"),
        ({"path": "missing.jpg"}, "is no readable file"),
    ],
)
def test_rows_that_are_refused(service: Service, tmp_path: Path, row: dict[str, Any], words: str) -> None:
    folder = tmp_path / "images"
    (folder / "out").symlink_to(photos()[0])
    os.mkfifo(folder / "pipe")
    with pytest.raises(DataError, match=f"image 0 of the request cannot be used: .*({words})"):
        service.answer([row])


def test_a_very_long_image_has_features(service: Service) -> None:
    """Its short side is not enlarged with the whole long one: data/views.py."""
    (answer,) = service.answer([{"image": png(np.zeros((1, 40_000), np.uint8))}])
    assert np.isfinite(answer["embedding"]).all()


def test_requests_that_are_refused(service: Service, tmp_path: Path) -> None:
    for rows in ([], [{"image": b""}] * (serving.MAX_IMAGES + 1)):
        with pytest.raises(DataError, match=f"the request has {len(rows)} images; send 1 to 256"):
            service.answer(rows)
    export = tmp_path / "run" / "export"
    with pytest.raises(DataError, match="this server opens no paths"):
        Service(export).answer([{"path": "one.jpg"}])
    head = export / "head.safetensors"
    head.write_bytes(head.read_bytes().replace(b'"weights":"', b'"weights":"0')[:-1])
    with pytest.raises(ConfigError, match=r"head.safetensors cannot be used .*clae export RUN --head"):
        Service(export)


@contextlib.contextmanager
def server(model: str, log: Path, **environment: str) -> Iterator[str]:
    """`mlflow models serve` on a free port; its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model, "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
                return bool(answer.status == 200)
            return False

        wait_for(answers, "mlflow models serve", 120)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(uri: str, body: object, kind: str = "application/json") -> tuple[int, str]:
    """Status and body of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(uri, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def images(*data: bytes) -> dict[str, Any]:
    return {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(one).decode()] for one in data]}}


@pytest.mark.slow
def test_a_server_of_the_champion(make_run: MakeRun, tmp_path: Path) -> None:
    """The promoted model, by its alias; bad requests are answered with 400 and a reason, and the server lives on."""
    pytest.importorskip("mlflow")
    from tests.evaluation.test_promotion import evaluated, gate

    run, uri = make_run(), f"sqlite:///{tmp_path}/mlflow.db"
    evaluated(run, 60.0)
    export = export_encoder(run, contents=Contents(head=True))
    assert (
        main(
            [
                "promote",
                str(run),
                "--name",
                "m",
                "--gate",
                gate(tmp_path, "metrics: {knn/accuracy: {at_least: 50}}"),
                "--uri",
                uri,
            ]
        )
        == OK
    )
    data = [path.read_bytes() for path in photos()]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(data[0])
    expected = embed(list(map(str, photos())), load_encoder(export), num_workers=0)
    environment = {"MLFLOW_TRACKING_URI": uri, "CLAE_SERVE_IMAGES": str(tmp_path / "images")}
    with server("models:/m@champion", tmp_path / "log", **environment) as address:

        def features(body: object) -> list[dict[str, Any]]:
            status, text = ask(address, body)
            assert status == 200, text
            return list(json.loads(text)["predictions"])

        found = features(images(*data))
        torch.testing.assert_close(torch.tensor([one["embedding"] for one in found]), torch.from_numpy(expected))
        assert found[0].keys() == {"embedding", "class", "probability"}
        records = {"dataframe_records": [{"path": "one.jpg"}]}
        torch.testing.assert_close(torch.tensor(features(records)[0]["embedding"]), torch.from_numpy(expected[0]))
        encoded = [base64.b64encode(one).decode() for one in data]
        refused = {
            "wrong type": ({"dataframe_records": [{"image": 3}]}, ""),
            "no base64": ({"dataframe_records": [{"image": "§§§"}]}, ""),
            "text": (images(b"no image"), "image 0 of the request cannot be used: not an image"),
            "empty batch": ({"dataframe_split": {"columns": ["image"], "data": []}}, "the request has 0 images; send 1 to 256"),
            "too many": (images(*[b"a"] * 257), "the request has 257 images"),
            "truncated": (images(data[0], data[1][:9000]), "image 1 of the request cannot be used"),
            "huge": (images(png(np.zeros((8000, 8000), np.uint8))), "8000x8000 pixels, more than 50,000,000"),
            "large file": (images(bytes(33 << 20)), "bytes, more than"),
            "path outside": ({"dataframe_records": [{"path": "../run/config.yaml"}]}, "is no readable file"),
            "tensors": ({"inputs": {"image": encoded}}, "not an image"),  # MLflow decodes base64 in tables alone
            "another column": ({"dataframe_records": [{"picture": encoded[0]}]}, ""),
            "a list": ([1, 2], ""),
            "no JSON": (b"{", ""),
        }
        for name, (body, words) in refused.items():
            status, text = ask(address, body)
            assert status == 400, (name, status, text[:500])
            assert words in json.loads(text)["message"], (name, text[:500])
            assert "Traceback" not in text, (name, text[:500])
        assert ask(address, b"a,b", "application/x-unknown")[0] == 415
        assert features(images(*data)) == found
