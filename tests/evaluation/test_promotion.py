"""`clae promote` and `clae rollback` on a real registry of MLflow in an sqlite file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from clae_dist.cli import main
from clae_dist.deploy import promotion
from clae_dist.deploy.encoder import load_encoder
from clae_dist.deploy.export import export_encoder
from clae_dist.deploy.gate import Facts, failures, read_gate
from clae_dist.deploy.layout import Contents
from clae_dist.deploy.onnx_graph import Graph
from clae_dist.errors import BAD_CONFIG, OK, UNEXPECTED, ConfigError
from clae_dist.tracking.mlflow_registry import CHAMPION, PREVIOUS, Registry, RegistryError
from tests.mlflow_server import binaries, team_server

pytest.importorskip("mlflow")
MakeRun = Callable[..., Path]
SETTINGS = {"knn": "images a", "calibration": "images a"}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def registry(uri: str, request: pytest.FixtureRequest) -> Registry:
    return Registry(uri, request.node.name)


@pytest.fixture
def make(make_run: MakeRun, tmp_path: Path) -> Callable[[int], Path]:
    """make(number): a run with weights of its own."""

    def run(number: int = 0) -> Path:
        return make_run(f"seed={number}", run_dir=tmp_path / f"run-{number}")

    return run


def evaluated(run: Path, knn: float, ece: float = 3.0, images_seen: int | None = None, key: str = "k") -> Path:
    """Give the run an export, and an evaluation with these results."""
    export = export_encoder(run)
    seen = json.loads((export / "config.json").read_text())["images_seen"] if images_seen is None else images_seen
    results = {
        "knn": {"accuracy": {"before": 10.0, "after": knn}, "accuracy_low": {"after": 0.0}},
        "calibration": {"ece": {"after": ece}},
    }
    protocols = {name: {"title": name, "description": name, "settings": {}, "key": key} for name in results}
    counts = dict.fromkeys(("num_classes", "train_images", "bank_images", "test_images"), 3)
    content = {"format": 2, "results": results, "protocols": protocols, "manifest_digest": "d", "neighbours": [], **counts}
    (run / "evaluation.json").write_text(json.dumps({**content, "images_seen": seen}))
    return run


def gate(folder: Path, text: str) -> str:
    path = folder / "gate.yaml"
    path.write_text(text)
    return str(path)


SOME = """
metrics:
  knn/accuracy: {at_least: 50, falls_by_at_most: 1}
  calibration/ece: {rises_by_at_most: 1}
  latency_ms: {at_most: 1e5}
"""


def aliases(registry: Registry) -> tuple[str, str]:
    return registry.aliased(CHAMPION), registry.aliased(PREVIOUS)


def test_promote_twice_and_roll_back(
    make: Callable[..., Path], registry: Registry, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = gate(tmp_path, SOME)
    first, second = evaluated(make(0), 60.0), evaluated(make(1), 59.5)
    words = ["--name", registry.name, "--gate", rules, "--uri", uri]
    assert main(["promote", str(first), *words]) == OK
    assert aliases(registry) == ("1", "")
    assert main(["promote", str(first), *words]) == OK
    assert "champion already" in capsys.readouterr().out
    assert main(["promote", str(second), *words]) == OK
    assert aliases(registry) == ("2", "1")
    weights = {number: version.weights for number, version in registry.versions().items()}
    assert weights["1"] != weights["2"]
    found = registry._client.get_model_version(registry.name, "2")
    files = {path.name for path in Path(found.source.removeprefix("file://")).iterdir()}
    assert files == {path.name for path in (second / "export").iterdir()} | {"MLmodel", "serve.py", "input_example.json"}
    for _ in range(2):
        assert main(["rollback", registry.name, "--uri", uri, "--reason", "drift"]) == OK
        assert aliases(registry) == ("1", "1")
    tag = registry._client.get_model_version(registry.name, "2").tags["clae.rolled_back"]
    assert tag.endswith("drift")
    assert main(["promote", str(second), *words]) == OK
    assert aliases(registry) == ("2", "1")
    assert len(registry.versions()) == 2
    assert [json.loads(line)["promoted"] for line in (second / "registry.jsonl").read_text().splitlines()] == ["2", "2"]


def test_a_broken_rule_changes_nothing(
    make: Callable[..., Path], registry: Registry, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", registry.name, "--gate", gate(tmp_path, SOME), "--uri", uri]
    assert main(["promote", str(evaluated(make(0), 40.0)), *words]) == UNEXPECTED
    assert registry.versions() == {}
    assert main(["promote", str(evaluated(make(1), 60.0)), *words]) == OK
    capsys.readouterr()
    assert main(["promote", str(evaluated(make(2), 58.0, ece=5.0)), *words]) == UNEXPECTED
    said = capsys.readouterr().out
    assert "knn/accuracy is 58, the champion has 60; the gate has falls_by_at_most: 1" in said
    assert "calibration/ece is 5, the champion has 3; the gate has rises_by_at_most: 1" in said
    assert aliases(registry) == ("1", "")
    assert set(registry.versions()) == {"1"}


@pytest.mark.parametrize("dies_at", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_leaves_a_champion(
    make: Callable[..., Path], registry: Registry, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Writes are: previous, champion, the note. The same command then finishes the promotion."""
    words = ["--name", registry.name, "--gate", gate(tmp_path, SOME), "--uri", uri]
    assert main(["promote", str(evaluated(make(0), 60.0)), *words]) == OK
    second = evaluated(make(1), 60.0)
    writes = []

    def dying(name: str, write: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if len(writes) == dies_at:
                raise KeyboardInterrupt
            writes.append(name)
            write(*arguments)

        return call

    with monkeypatch.context() as patched:
        for name in ("set_alias", "note"):
            patched.setattr(Registry, name, dying(name, getattr(Registry, name)))
        with pytest.raises(KeyboardInterrupt):
            promotion.promote(second, promotion.RunFolder(second).read_config(), read_gate(Path(words[3])), registry, print)
    assert aliases(registry) == [("1", ""), ("1", "1"), ("2", "1")][dies_at]
    assert main(["promote", str(second), *words]) == OK
    assert aliases(registry) == ("2", "1")


@pytest.mark.slow
def test_two_promotions_at_once_are_noticed(
    make: Callable[..., Path], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [evaluated(make(seed), 60.0) for seed in range(3)]
    config = promotion.RunFolder(runs[0]).read_config()
    assert promotion.promote(runs[0], config, {}, registry, print) == []
    register = Registry.register

    def overtaken(self: Registry, *arguments: Any) -> Any:
        monkeypatch.setattr(Registry, "register", register)
        assert promotion.promote(runs[1], config, {}, registry, print) == []
        return register(self, *arguments)

    monkeypatch.setattr(Registry, "register", overtaken)
    with pytest.raises(RegistryError, match="another promotion has changed the champion"):
        promotion.promote(runs[2], config, {}, registry, print)
    assert aliases(registry) == ("2", "1")


def test_aliases_of_deleted_versions_and_ways_back_that_are_none(
    make: Callable[..., Path], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RegistryError, match=f"has no model '{registry.name}'; it has "):
        promotion.roll_back(registry, "", print)
    run = evaluated(make(), 60.0)
    config = promotion.RunFolder(run).read_config()
    promotion.promote(run, config, {}, registry, print)
    with pytest.raises(RegistryError, match="no alias 'previous'"):
        promotion.roll_back(registry, "", print)
    monkeypatch.setattr(Registry, "versions", lambda self: {})  # MLflow drops such aliases itself; another store may not
    with pytest.raises(RegistryError, match="names version 1, which was deleted"):
        registry.version_of(CHAMPION)


def test_a_server_that_is_away_is_said_and_nothing_changed(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", "m", "--gate", gate(tmp_path, SOME), "--uri", "http://127.0.0.1:1"]
    assert main(["promote", str(evaluated(make(), 60.0)), *words]) == BAD_CONFIG
    assert "does not answer" in capsys.readouterr().err
    assert main(["rollback", "m"]) == BAD_CONFIG


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must have one key, metrics"),
        ("metrics: {}", "must have one key, metrics"),
        ("metrics: {knn/accuracy: {least: 3}}", "use one or more of at_least"),
        ("metrics: {knn/accuracy: {at_least: high}}", "use a number"),
        ("metrics: {latency_ms: {rises_by_at_most: 1}}", "give at_most alone"),
        ("metrics: {onnx_difference: {at_least: 1}}", "give at_most alone"),
        ("metrics: [", "cannot be read"),
    ],
)
def test_gates_that_cannot_be_used(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_gate(Path(gate(tmp_path, text)))


def test_rules() -> None:
    champion = Facts({"knn/accuracy": 50.0, "calibration/ece": 4.0}, SETTINGS)
    better = Facts({"knn/accuracy": 60.0, "calibration/ece": 2.0}, SETTINGS)
    strict = {"knn/accuracy": {"falls_by_at_most": 0.0}, "calibration/ece": {"rises_by_at_most": 0.0}}
    assert failures(strict, better, champion) == failures(strict, champion, champion) == failures(strict, champion, None) == []
    assert len(failures(strict, champion, better)) == 2
    known = "calibration/ece, knn/accuracy, latency_ms, onnx_difference, and int8/"
    with pytest.raises(ConfigError, match=f"names 'knn/acuracy', .*known: {known}"):
        failures({"knn/acuracy": {"at_least": 1.0}}, better, None)
    with pytest.raises(ConfigError, match="the champion has no"):
        failures(strict, better, Facts({}, {}))
    with pytest.raises(ConfigError, match="of other images or settings"):
        failures(strict, better, Facts(champion.metrics, {"knn": "images b"}))


def test_a_champion_is_promoted_again_after_another_evaluation(make: Callable[..., Path], registry: Registry) -> None:
    """The way out of "of other images or settings"."""
    rules = {"knn/accuracy": {"falls_by_at_most": 0.0}}
    run, better = evaluated(make(0), 60.0), evaluated(make(1), 70.0, key="other")
    config = promotion.RunFolder(run).read_config()
    assert promotion.promote(run, config, rules, registry, print) == []
    with pytest.raises(ConfigError, match="of other images or settings"):
        promotion.promote(better, config, rules, registry, print)
    assert promotion.promote(evaluated(run, 50.0, key="other"), config, rules, registry, print) == []
    assert promotion.promote(better, config, rules, registry, print) == []
    assert aliases(registry) == ("2", "1")


def test_an_evaluation_of_another_checkpoint_is_refused(make: Callable[..., Path], registry: Registry) -> None:
    run = evaluated(make(), 60.0, images_seen=1)
    with pytest.raises(ConfigError, match="of 224 images seen and evaluation.json of 1"):
        promotion.promote(run, promotion.RunFolder(run).read_config(), {}, registry, print)
    (run / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match="has no evaluation.json"):
        promotion.promote(run, promotion.RunFolder(run).read_config(), {}, registry, print)


@pytest.mark.slow
def test_the_gate_measures_graphs_and_refuses_those_of_another_encoder(
    make: Callable[..., Path], registry: Registry, tmp_path: Path
) -> None:
    runs = [evaluated(make(seed), 60.0) for seed in range(2)]
    config, rule = promotion.RunFolder(runs[0]).read_config(), {"onnx_difference": {"at_most": 1e-4}}
    with pytest.raises(ConfigError, match=r"has no encoder.onnx; `clae export .* --format onnx`"):
        promotion.promote(runs[0], config, rule, registry, print)
    graphs = [export_encoder(run, contents=Contents.parse("onnx")) / "encoder.onnx" for run in runs]
    own = graphs[0].read_bytes()
    graphs[0].write_bytes(graphs[1].read_bytes())
    with pytest.raises(ConfigError, match=r"encoder.onnx cannot be used \(it is of another encoder, whose weights are"):
        promotion.promote(runs[0], config, {}, registry, print)
    model, other = onnx.load(graphs[1]), Graph(graphs[1]).facts
    onnx.helper.set_model_props(model, {**other, "clae-dist weights": load_encoder(runs[0]).weights_digest()})
    onnx.save(model, graphs[0])
    (broken,) = promotion.promote(runs[0], config, rule, registry, print)
    assert broken.startswith("onnx_difference is ")
    assert registry.versions() == {}
    graphs[0].write_bytes(own)
    report = {
        "weights": load_encoder(runs[0]).weights_digest(),
        "manifest_digest": "d",
        "images": {"test": 30},
        "cosine": {"mean": 0.99},
        "knn": {"int8": {"percent": 90.0}},
        "knn_agreement": {"percent": 96.0},
        "linear": {"old_head": {"percent": 91.0}},
    }
    path = runs[0] / "export" / "onnx-int8.json"
    path.write_text(json.dumps(report))
    assert promotion.promote(runs[0], config, {"int8/knn_agreement": {"at_least": 97}}, registry, print) != []
    path.write_text(json.dumps(report | {"weights": "other"}))
    with pytest.raises(ConfigError, match="onnx-int8.json is of another encoder"):
        promotion.promote(runs[0], config, rule, registry, print)
    path.write_text(json.dumps(report | {"knn_agreement": {"percent": 98.0}}))
    both = {**rule, "int8/knn_agreement": {"at_least": 97}}
    assert promotion.promote(runs[0], config, both, registry, print) == []
    assert aliases(registry) == ("1", "")
    assert registry.versions()["1"].facts["metrics"]["int8/linear"] == 91.0


@pytest.mark.slow
@pytest.mark.skipif(binaries() is None, reason="PostgreSQL is not installed")
def test_on_a_team_server(make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over HTTP, where artifacts go through the server and a version's files must lie in its run; the server dies between."""
    with team_server() as (_, server):
        words = ["--name", "plants", "--gate", gate(tmp_path, SOME), "--uri", server.uri]
        first, second = evaluated(make(0), 60.0), evaluated(make(1), 60.0)
        assert main(["promote", str(first), *words]) == OK
        server.kill()
        assert main(["promote", str(second), *words]) == BAD_CONFIG
        assert main(["rollback", "plants", "--uri", server.uri]) == BAD_CONFIG
        assert "does not answer" in capsys.readouterr().err
        server.start()
        registry = Registry(server.uri, "plants")
        assert aliases(registry) == ("1", "")
        assert main(["promote", str(second), *words]) == OK
        assert aliases(registry) == ("2", "1")
        assert main(["rollback", "plants", "--uri", server.uri]) == OK
        assert aliases(registry) == ("1", "1")
        found = registry._client.get_model_version("plants", "2")
        folder = registry._client.download_artifacts(found.run_id, found.source.partition("/artifacts/")[2], str(tmp_path))
        assert load_encoder(folder).weights_digest() == registry.versions()["2"].weights


@pytest.mark.parametrize("uri", ["file:///somewhere/mlruns", "mlruns"])
def test_a_folder_is_no_registry(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"is a folder, and a registry of models needs a database; use --uri sqlite"):
        Registry(uri, "plants")
