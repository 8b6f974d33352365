"""A real MLflow store: an sqlite file that is asked back through the vendor's client, and servers that are not there."""

from __future__ import annotations

import io
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Config, Tracking, Train
from clae_dist.keys import flatten
from clae_dist.tracking import Status, Tracker, Trackers, build_trackers, continue_tracking, new_run_key
from clae_dist.tracking.background import BackgroundTracker
from clae_dist.tracking.mlflow import page_command

mlflow = pytest.importorskip("mlflow")
TAGS = {"package_version": "0.1.0", "git_revision": "0123abcd", "manifest_digest": "sha256:feed"}


def build(config: Config, run_dir: Path, run_key: str, stream: io.StringIO, seen: int = 0) -> Trackers:
    return build_trackers(config, run_dir, run_key, tags=TAGS, total_steps=10, resume_images_seen=seen, stream=stream)


def add_to(config: Config, run_dir: Path, run_key: str, stream: io.StringIO, seen: int = 0) -> Tracker:
    """What `clae evaluate`, `report` and `export` log to."""

    def say(text: str) -> None:
        print(text, file=stream)

    return continue_tracking(config, run_dir, run_key, tags=TAGS, images_seen=seen, say=say)


def run_of(client: Any, run_key: str) -> Any:
    """The one MLflow run of this key."""
    (experiment,) = [found for found in client.search_experiments() if found.name == "clae-dist"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`clae.run_key` = '{run_key}'")
    return client.get_run(run.info.run_id)


def logged_loss(client: Any, run_key: str) -> bool:
    experiment = client.get_experiment_by_name("clae-dist")
    found = client.search_runs([experiment.experiment_id], f"tags.`clae.run_key` = '{run_key}'")
    return any("train/loss" in run.data.metrics for run in found)


@pytest.fixture(scope="module")
def client_and_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """One run that was stopped and continued, in a store that did not exist before. The tables take seconds to make."""
    folder = tmp_path_factory.mktemp("runs")
    run_dir, run_key, stream = folder / "first", new_run_key(), io.StringIO()
    (folder / "export").mkdir()
    (folder / "export/encoder.safetensors").write_bytes(b"weights")
    (folder / "export/config.json").write_text('{"input_size": [3, 16, 16], "num_features": 64}')
    (folder / "report").mkdir()
    (folder / "report/report.html").write_text("<p>report</p>")

    trackers = build(Config(name="first"), run_dir, run_key, stream)
    for step in range(1, 4):
        trackers.log({"step": step, "loss": 3.0 - step, "grad_norm": math.inf if step == 1 else 1.0}, 256 * step)
    trackers.close("stopped")
    # images 512 is the checkpoint; the third step is trained and logged again
    trackers = build(Config(name="first", train=Train(log_every=3)), run_dir, run_key, stream, seen=512)
    for step in range(3, 5):
        trackers.log({"step": step, "loss": 3.0 - step}, 256 * step)
    trackers.tag("alarm.collapse", "step 3: the cause")
    trackers.log_model(folder / "export", "sha256:feed")
    trackers.close("finished")
    # `clae report` and `clae export` come later and add to the same run; that encoder is there already
    later = add_to(Config(name="first", train=Train(log_every=3)), run_dir, run_key, stream, seen=1024)
    later.log_artifacts(folder / "report", "report")
    later.log_artifacts(folder / "report/report.html", "single")
    later.log_model(folder / "export", "sha256:feed")
    later.close("finished")
    assert not any(word in stream.getvalue() for word in ("is unreachable", "refused", "did not")), stream.getvalue()
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client, run_of(client, run_key), folder


def test_one_run_with_its_state(client_and_run: tuple[Any, Any, Path]) -> None:
    client, run, _ = client_and_run
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    experiment = client.get_experiment_by_name("clae-dist")
    named = client.search_runs([experiment.experiment_id], "attributes.run_name = 'first'")
    assert [found.info.run_id for found in named] == [run.info.run_id]


def test_metrics_are_keyed_by_images_seen(client_and_run: tuple[Any, Any, Path]) -> None:
    client, run, _ = client_and_run
    history = {(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert history == {(256, 2.0), (512, 1.0), (768, 0.0), (1024, -1.0)}  # the replay fell on its own steps


def test_parameters_are_the_resolved_config_and_tags_say_what_ran(client_and_run: tuple[Any, Any, Path]) -> None:
    _, run, _ = client_and_run
    assert run.data.params == {key: str(value) for key, value in flatten(Config(name="first")).items()}
    assert TAGS.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.source.git.commit"] == "0123abcd"
    assert run.data.tags["continued.train.log_every"] == "3"  # MLflow's parameters cannot change


def test_artifacts_lie_beside_the_database(client_and_run: tuple[Any, Any, Path]) -> None:
    client, run, folder = client_and_run
    assert run.info.artifact_uri.startswith((folder / "mlartifacts").as_uri())
    names = [item.path for kind in ("report", "single") for item in client.list_artifacts(run.info.run_id, kind)]
    assert names == ["report/report.html", "single/report.html"]


def test_the_encoder_is_a_logged_model_of_files_with_the_manifests_digest(client_and_run: tuple[Any, Any, Path]) -> None:
    client, run, folder = client_and_run
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("encoder", "READY", run.info.run_id)
    assert (model.params["manifest_digest"], model.params["images_seen"]) == ("sha256:feed", "1024")
    assert model.tags["manifest_digest"] == "sha256:feed"
    files = sorted(item.path for item in client.list_logged_model_artifacts(model.model_id))
    assert files == ["MLmodel", "config.json", "encoder.safetensors", "input_example.json", "serve.py"]
    assert model.artifact_location.startswith((folder / "mlartifacts").as_uri())


def test_system_metrics_of_a_longer_run(tmp_path: Path, client_and_run: tuple[Any, Any, Path]) -> None:
    from clae_dist.tracking.mlflow import MlflowStore

    client, _, folder = client_and_run
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    store = MlflowStore(uri, Config(), "second", new_run_key(), {}, print)
    store.system_metrics_every_s = 0.2
    tracker = BackgroundTracker(store, print)
    deadline = time.monotonic() + 20
    while not (store.run_id and "system/cpu_utilization_percentage" in client.get_run(store.run_id).data.metrics):
        assert time.monotonic() < deadline, "no system metrics after 20 s"
        time.sleep(0.1)
    tracker.close("failed")
    assert client.get_run(store.run_id).info.status == "FAILED"


@pytest.mark.parametrize(("ended", "status"), [("stopped", "KILLED"), ("failed", "FAILED"), (None, "RUNNING")])
def test_what_comes_after_training_leaves_the_status_as_it_was(
    client_and_run: tuple[Any, Any, Path], ended: Status | None, status: str
) -> None:
    """`clae evaluate` on a stopped run, or beside one that is training, made it FINISHED."""
    client, _, folder = client_and_run
    run_dir, run_key, stream = folder / f"ended-{ended}", new_run_key(), io.StringIO()
    trackers = build(Config(), run_dir, run_key, stream)
    trackers.log({"step": 1, "loss": 1.0}, 256)
    if ended:
        trackers.close(ended)
    else:
        deadline = time.monotonic() + 20
        while not logged_loss(client, run_key):
            assert time.monotonic() < deadline, "no loss after 20 s"
            time.sleep(0.1)
    before = run_of(client, run_key).info
    assert before.status == status
    later = add_to(Config(), run_dir, run_key, stream, seen=256)
    later.log({"knn_accuracy_after": 43.0}, 256)
    later.log_model(folder / "export", "sha256:feed")
    later.close("finished")
    after = run_of(client, run_key)
    assert (after.info.status, after.info.end_time) == (before.status, before.end_time)
    assert after.data.metrics["eval/knn_accuracy_after"] == 43.0
    assert [output.step for output in after.outputs.model_outputs] == [256]
    if not ended:
        trackers.close("finished")
        assert run_of(client, run_key).info.status == "FINISHED"


def test_a_run_that_was_trained_while_mlflow_was_away_is_made_and_ended_later(client_and_run: tuple[Any, Any, Path]) -> None:
    client, _, folder = client_and_run
    run_key = new_run_key()
    later = add_to(Config(), folder / "unknown", run_key, io.StringIO(), seen=256)
    later.log({"knn_accuracy_after": 43.0}, 256)
    later.close("finished")
    run = run_of(client, run_key)
    assert (run.info.status, run.data.metrics["eval/knn_accuracy_after"]) == ("FINISHED", 43.0)


def test_what_a_finished_run_could_not_send_is_sent_later_and_once(client_and_run: tuple[Any, Any, Path]) -> None:
    """The server was away at the end, or the process was killed before it had sent all."""
    client, _, folder = client_and_run
    run_dir, run_key, stream = folder / "unsent", new_run_key(), io.StringIO()
    trackers = build(Config(), run_dir, run_key, stream)
    trackers.log({"step": 1, "loss": 2.0}, 256)
    trackers.close("stopped")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 512, "step": 2, "loss": 1.0}\n{"images_seen": 768, "lo')  # cut off by the kill

    def again() -> Any:
        late = continue_tracking(Config(), run_dir, run_key, tags=TAGS, images_seen=512, say=lambda _: None, trained=True)
        late.log_model(folder / "export", "sha256:feed")
        late.close("finished")
        return run_of(client, run_key)

    first, second = again(), again()
    history = [(found.step, found.value) for found in client.get_metric_history(second.info.run_id, "train/loss")]
    assert history == [(256, 2.0), (512, 1.0)]
    assert (first.info.status, first.info.end_time) == ("FINISHED", second.info.end_time)
    assert [output.step for output in second.outputs.model_outputs] == [512]


def test_the_encoder_has_a_signature_and_an_example(client_and_run: tuple[Any, Any, Path], tmp_path: Path) -> None:
    from mlflow.models import Model

    client, run, _ = client_and_run
    (output,) = run.outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location.removeprefix("file://")
    model = Model.load(location)
    assert model.signature.inputs.input_names() == ["image", "path"]
    assert model.signature.outputs.input_names() == ["embedding"]
    assert len(model.load_input_example(location)) == 1
    assert model.flavors["python_function"]["model_code_path"] == "serve.py"


def test_a_run_has_tags_for_method_seed_and_revision(client_and_run: tuple[Any, Any, Path]) -> None:
    _, run, _ = client_and_run
    assert (run.data.tags["method"], run.data.tags["seed"], run.data.tags["git_revision"]) == ("clae", "0", "0123abcd")
    assert run.data.tags["alarm.collapse"] == "step 3: the cause"


def test_the_page_is_opened_by_a_command_that_a_shell_takes_as_it_is() -> None:
    assert page_command("sqlite:////a/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////a/mlflow.db"
    assert page_command("sqlite:////a b/it's.db") == """mlflow ui --backend-store-uri 'sqlite:////a b/it'"'"'s.db'"""
    assert page_command("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize("server", ["dead", "silent"])
def test_a_server_that_is_away_does_not_slow_a_step(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dead: the connection is refused. silent: it is accepted and never answered."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    stream = io.StringIO()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen(5)
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        trackers = build(Config(tracking=Tracking(uri=uri)), tmp_path / "run", new_run_key(), stream)
        slowest = 0.0
        for step in range(200):
            start = time.perf_counter()
            trackers.log({"step": step, "loss": 1.0}, step)
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.01)
        start = time.perf_counter()
        trackers.close("finished")
    text = stream.getvalue()
    assert slowest < 0.5, "a step waited for MLflow"  # the request takes 1 s; half of that leaves room for a busy machine
    assert time.perf_counter() - start < 15
    assert text.count("is unreachable") == 1
    assert "did not get 200 rows of metrics; the run folder has all of it." in text
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 200
