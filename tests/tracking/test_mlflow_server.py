"""Training against an MLflow server over PostgreSQL that is away, slow, full or restarted: no step is lost, none waits."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clae_dist.config import Batch, Checkpointing, Config, Tracking, Train
from clae_dist.data.manifest import Manifest
from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.trust import Permission
from clae_dist.tracking.background import BackgroundTracker
from clae_dist.tracking.metric_groups import grouped
from clae_dist.tracking.mlflow import MlflowStore
from clae_dist.tracking.nested import PARENT_TAG, Nested, record_nested
from clae_dist.training.finish import Request, evaluate, report
from clae_dist.training.train import train
from clae_dist.world import World
from tests import processes
from tests.http_faults import Fault, serve
from tests.mlflow_server import PASSWORD, Postgres, Proxy, Server, binaries, team_server, wait_for
from tests.processes import Completed
from tests.small_run import small_run
from tests.tracking.test_tensorboard import points

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("psycopg2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(binaries() is None, reason="PostgreSQL is not installed; Debian: apt-get install postgresql"),
]
STEPS = 16


@pytest.fixture(scope="module")
def team() -> Iterator[tuple[Postgres, Server]]:
    with team_server() as both:
        yield both


@pytest.fixture
def proxy(team: tuple[Postgres, Server], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setitem(BackgroundTracker.__init__.__kwdefaults__, "retry_s", 0.2)
    running = Proxy(team[1].port)
    yield running
    running.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_synthetic_set(tmp_path_factory.mktemp("data") / "shards", 32, 16)


def recipe(shards: Manifest, run_dir: Path, uri: str) -> Config:
    return small_run(
        shards.folder,
        run_dir,
        batch=Batch(global_size=8),
        train=Train(epochs=STEPS // 4, precision="float32", knn_every=0, threads=1, log_every=1),
        checkpoint=Checkpointing(every_steps=4),
        tracking=Tracking(uri=uri),
    )


class Script(io.StringIO):
    """A console on which the line of a step makes something happen, in the training thread, before the next step."""

    def __init__(self, acts: dict[int, Callable[[], Any]]) -> None:
        super().__init__()
        self._acts = acts

    def write(self, text: str) -> int:
        found = re.match(r"step +(\d+)/", text)
        if found and int(found[1]) in self._acts:
            self._acts.pop(int(found[1]))()
        return super().write(text)


def assert_all_there(server: Server, run_dir: Path) -> None:
    """Each metric of each line of metrics.jsonl, once, with its value."""
    client = mlflow.MlflowClient(server.uri)
    key = RunFolder(run_dir).read_identity().run_key
    (experiment,) = [one for one in client.search_experiments() if one.name == "clae-dist"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`clae.run_key` = '{key}'")
    assert run.info.status == "FINISHED"
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen = row.pop("images_seen")
        for name, value in row.items():
            wanted.setdefault(name, []).append((seen, value))
    assert len(wanted["loss"]) == STEPS
    for name, values in wanted.items():
        found = sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, grouped(name)))
        assert [step for step, _ in found] == [step for step, _ in values], name
        if name in ("loss", "loss_clean", "loss_adversarial", "grad_norm", "learning_rate"):  # others are times
            assert [value for _, value in found] == pytest.approx([value for _, value in values]), name


@pytest.mark.parametrize("mode", ["refuse", "stall", "full"])
def test_a_server_that_fails_mid_run_costs_no_step_and_no_metric(
    team: tuple[Postgres, Server], proxy: Proxy, shards: Manifest, tmp_path: Path, mode: Any
) -> None:
    passed: list[int] = []

    def back() -> None:
        passed.append(proxy.asked)  # steps 5 to 12 were made while the proxy was asked and did not answer
        proxy.set("through")

    script = Script(
        {
            4: lambda: proxy.set(mode),
            5: lambda: wait_for(lambda: proxy.asked > 0, "a request"),
            11: lambda: wait_for(lambda: "is unreachable" in script.getvalue(), "a word about it"),
            12: back,
            14: lambda: wait_for(lambda: "is reachable again" in script.getvalue(), "that it is back"),
        }
    )
    outcome = train(Recipe(recipe(shards, tmp_path / "run", proxy.uri)), World.single("cpu"), script)
    assert (outcome.status, outcome.step) == ("finished", STEPS)
    assert passed[0] > 0
    said = [line for line in script.getvalue().splitlines() if "is unreachable" in line or "is reachable again" in line]
    assert ["is reachable again" in line for line in said] == [False, True], said
    assert_all_there(team[1], tmp_path / "run")


def test_the_page_of_a_run_and_of_its_study(
    team: tuple[Postgres, Server], shards: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained, evaluated and reported run as its user finds it, asked of the server; TensorBoard has the same values."""
    from mlflow.models import Model

    opening = MlflowStore.open

    def often(store: MlflowStore) -> None:
        store.system_metrics_every_s = 0.2
        opening(store)

    monkeypatch.setattr(MlflowStore, "open", often)
    _, server = team
    run_dir = tmp_path / "run"
    config = recipe(shards, run_dir, server.uri)
    config = replace(config, tracking=Tracking(uri=server.uri, name="mlflow+tensorboard"))
    assert train(Recipe(config), World.single("cpu"), io.StringIO()).status == "finished"
    said: list[str] = []
    trusted = Permission(trust=True)  # `train` was called without the command, which remembers whose folder it is
    evaluate(Request(str(run_dir), suite="knn", device="cpu", threads=1, permission=trusted), say=said.append)
    report(run_dir, say=said.append, permission=trusted)
    assert not [line for line in said if "MLflow" in line]
    identity = RunFolder(run_dir).read_identity()
    study = Nested("study", "studykey", (identity.run_key,), {"clae/knn": 1.0}, {"baseline": "simclr"}, (), finished=True)
    parent = record_nested(server.uri, "clae-dist", study)

    assert_all_there(server, run_dir)
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("clae-dist").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'")
    assert client.get_run(parent).data.metrics == {"clae/knn": 1.0}
    tags = {"method": config.method.name, "seed": "0", "clae.run_key": identity.run_key, **identity.tags}
    assert tags.items() <= run.data.tags.items()
    assert {"git_revision", "manifest_digest"} <= identity.tags.keys()
    assert run.data.params["batch.global_size"] == "8"
    (images,) = run.inputs.dataset_inputs
    assert (images.dataset.digest, images.tags[0].value) == (shards.digest[:36], "training")
    assert json.loads(images.dataset.profile)["manifest_digest"] == shards.digest
    names = set(run.data.metrics)
    assert {"train/loss", "train/loss_step", "attack/delta_linf_mean", "attack/attack_loss_after"} <= names
    assert {"eval/knn_accuracy_before", "eval/knn_accuracy_after", "system/cpu_utilization_percentage"} <= names
    groups = {"train", "attack", "embedding", "alarm", "eval", "speed", "goodput", "system"}
    assert {name.partition("/")[0] for name in names} <= groups

    top, pages = ({one.path for one in client.list_artifacts(run.info.run_id, path)} for path in (None, "report"))
    assert {"config.yaml", "report"} <= top
    assert "report/report.html" in pages
    stored = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert Path(stored).read_text() == (run_dir / "config.yaml").read_text()
    (output,) = run.outputs.model_outputs
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    folder = mlflow.artifacts.download_artifacts(f"models:/{output.model_id}", dst_path=str(tmp_path / "model"))
    model = Model.load(folder)
    assert model.signature.inputs.input_names() == ["image", "path"]
    assert len(model.load_input_example(folder)) == 1

    for name in (name for name in names if not name.startswith("system/")):
        history = sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
        found = sorted(points(run_dir, name))
        assert [step for step, _ in found] == [step for step, _ in history], name
        assert [value for _, value in found] == pytest.approx([value for _, value in history], rel=1e-6), name  # float32


def test_away_at_the_start_and_the_database_gone_for_a_while(
    team: tuple[Postgres, Server], proxy: Proxy, shards: Manifest, tmp_path: Path
) -> None:
    database, server = team

    def lose_database() -> None:
        wait_for(lambda: "is reachable again" in script.getvalue(), "that it is back")
        database.stop()

    def find_database() -> None:
        wait_for(lambda: script.getvalue().count("is unreachable") == 2, "a word about the database")
        database.start()

    script = Script({3: lambda: proxy.set("through"), 6: lose_database, 12: find_database})
    proxy.set("refuse")
    train(Recipe(recipe(shards, tmp_path / "run", proxy.uri)), World.single("cpu"), script)
    assert (script.getvalue().count("is unreachable"), script.getvalue().count("is reachable again")) == (2, 2)
    assert_all_there(server, tmp_path / "run")
    assert PASSWORD not in script.getvalue()


def test_a_kill_leaves_nothing_twice_and_nothing_out(team: tuple[Postgres, Server], shards: Manifest, tmp_path: Path) -> None:
    """MLflow keeps every value that it is sent: the steps after a checkpoint were there twice."""
    _, server = team
    config = recipe(shards, tmp_path / "run", server.uri)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    first = context.Process(target=_until_step_6, args=(config, theirs))
    first.start()
    assert ours.recv() == "two steps after the checkpoint"
    wait_for(lambda: _has(server, tmp_path / "run", 5 * 8), "the metrics of step 5")  # the console hears of step 6 first
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    console = io.StringIO()
    train(Recipe(config), World.single("cpu"), console)
    assert "resuming after step 4" in console.getvalue()
    assert_all_there(server, tmp_path / "run")


def _until_step_6(config: Config, pipe: Any) -> None:
    train(Recipe(config), World.single("cpu"), Script({6: lambda: [pipe.send("two steps after the checkpoint"), pipe.recv()]}))


def _has(server: Server, run_dir: Path, images_seen: int) -> bool:
    client = mlflow.MlflowClient(server.uri)
    key = RunFolder(run_dir).read_identity().run_key
    experiment = client.get_experiment_by_name("clae-dist")
    runs = client.search_runs([experiment.experiment_id], f"tags.`clae.run_key` = '{key}'")
    return any(one.step >= images_seen for run in runs for one in client.get_metric_history(run.info.run_id, "train/loss"))


def test_secrets_reach_no_file_no_console_and_no_server(
    team: tuple[Postgres, Server], proxy: Proxy, shards: Manifest, tmp_path: Path
) -> None:
    """Planted in the environment and in every URL and command that a run is given; then everything it leaves is searched."""
    names = ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "PGPASSWORD", "MLFLOW_TRACKING_PASSWORD", "MY_API_KEY"]
    environment = processes.environment(**{name: f"canary-{name}" for name in names})
    environment |= {
        "MLFLOW_TRACKING_URI": proxy.uri.replace("://", "://me:canary-login@"),
        "CLAE_CACHE": str(tmp_path / "home"),
    }
    settings = ["data.image_size=16", "data.workers=0", "batch.global_size=8", "model.encoder=small_resnet", "train.epochs=1"]
    settings += ["optim.warmup_epochs=0", "train.knn_every=0", "launch.workers=1", "data.timeout_s=5", "data.retries=1"]
    (tmp_path / "recipe.yaml").write_text("name: secrets\n")
    said = []

    def clae(*arguments: str) -> Completed:
        done = processes.clae(*arguments, cwd=tmp_path, env=environment)
        said.append(done.stdout + done.stderr)
        return done

    with serve(shards.folder) as files:
        url = files.url.replace("://", "://me:canary-url@") + "/?sig=canary-signature"
        more = f"pipe:TOKEN=canary-command cat {shards.folder}/train-000000.tar"
        mixture = f"data.mixture={{{json.dumps(more)}: 0.25}}"
        assert clae("train", "recipe.yaml", f"data.shards={url}", mixture, "run_dir=run", *settings).returncode == 0, said
        clae("config", "recipe.yaml", f"data.shards={url}", mixture, *settings)
        files.choose = lambda name, _: Fault("status", code=403)
        environment["CLAE_CACHE"] = str(tmp_path / "another")
        assert clae("train", "recipe.yaml", f"data.shards={url}", "run_dir=failed", *settings).returncode == 3
        database = "postgresql+psycopg2://clae:canary-database@127.0.0.1:9/x"
        clae("train", "recipe.yaml", f"data.shards={shards.folder}", "run_dir=away", f"tracking.uri={database}", *settings)
    assert "postgresql+psycopg2://clae@127.0.0.1:9/x" in said[-1]  # which did not get it; the password is not part of the name
    kept = {path: path.read_bytes() + path.name.encode() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in kept} >= {"config.yaml", "run.json", "console.log", "metrics.jsonl"}
    assert b"manifest_digest" in proxy.received
    found = {str(path) for path, data in kept.items() if b"canary" in data}
    assert (found, b"canary" in proxy.received, ["canary" in text for text in said]) == (set(), False, [False] * len(said))
