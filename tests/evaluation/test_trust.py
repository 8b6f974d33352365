"""A run folder made by others is data: opening it runs, contacts, writes and follows nothing that it names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clae_dist.cli import main
from clae_dist.config import Config, Evaluation, Train
from clae_dist.data.urls import expand, scheme
from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe, from_yaml, read_recipe
from clae_dist.runs.folder import FILES, FOLDERS
from clae_dist.runs.trust import Permission, acts, is_remembered, open_run, remember
from clae_dist.tracking import Tracker
from clae_dist.training import finish
from tests.small_run import small_run

MakeRun = Callable[..., Path]
REFUSED = "no `clae train` of yours on this machine used these settings in this folder"


def commands(run: Path) -> dict[str, list[str]]:
    """Every command that opens a run."""
    return {
        "evaluate": ["evaluate", str(run)],
        "report": ["report", str(run)],
        "export": ["export", str(run)],
        "checkpoints": ["checkpoints", str(run), "--verify"],
        "replay": ["replay", str(run / "nonfinite" / "step-00000001")],
        "doctor": ["doctor", str(run / "config.yaml")],
        "dry-run": ["dry-run", str(run / "config.yaml")],
    }


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CLAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@contextmanager
def listening() -> Iterator[tuple[str, list[bytes]]]:
    """host:port of a server that answers nothing, and what it is sent."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    came.append(b"connected")
                    try:
                        came.append(connection.recv(65536))
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", came
        server.shutdown(socket.SHUT_RDWR)


WAYS = [
    "pipe:touch {0}",
    *(pytest.param(way, marks=pytest.mark.slow) for way in ("/x.tar::pipe:touch {0}", "/x-{{0..1}}.tar::pi{{p,q}}e:touch {0}")),
    pytest.param("mixture", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("way", WAYS)
def test_no_command_that_opens_a_run_runs_its_commands(
    make_run: MakeRun, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "executed"
    setting = f'data.mixture={{"pipe:touch {marker}": 0.25}}' if way == "mixture" else f"data.shards={way.format(marker)}"
    run = make_run(setting, "tracking.name=none")
    codes = {name: main(words) for name, words in commands(run).items()}
    said = capsys.readouterr().err
    assert not marker.exists()
    needed = {"replay", "doctor"} if way == "mixture" else {"evaluate", "replay", "doctor", "dry-run"}
    assert {name for name, code in codes.items() if code == 2} >= needed, codes
    assert REFUSED in said
    assert "--trust" in said
    assert codes["report"] == codes["export"] == codes["checkpoints"] == 0  # which need no images


def test_with_the_flag_the_command_runs(make_run: MakeRun, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    run = make_run(f"data.shards=pipe:touch {tmp_path / 'executed'}", "tracking.name=none", "data.retries=0")
    main(["evaluate", str(run), "--trust"])
    assert (tmp_path / "executed").exists()


def test_the_images_of_a_strangers_run_can_be_named(make_run: MakeRun, labelled_shards: Path) -> None:
    run = make_run("data.shards=pipe:false", "tracking.name=none", "data.cache=/nowhere/at/all")
    assert main(["evaluate", str(run), "--shards", str(labelled_shards)]) == 0


@pytest.mark.parametrize("text", ["x.tar", "a-{0..9}.tar::b.tar", "file:///d/x", "", "/d/a b"])
def test_paths_of_this_machine_do_not_act(text: str) -> None:
    assert not acts(text)


@pytest.mark.parametrize(
    "text", ["pipe:x", "{a,pipe:x}", "{pipe,a}:x", "pi{pe,x}:y", "s3://b/x", "x.tar::http://h/x.tar", "file:pipe:x"]
)
def test_whatever_has_a_scheme_acts(text: str) -> None:
    assert acts(text)
    assert any(map(scheme, expand(text.replace("file:", "")))), "the test's own texts have one"


def test_no_server_that_a_strangers_run_names_is_contacted(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary")
    with listening() as (host, came):
        run = make_run(
            f"data.shards=http://{host}/set", f"tracking.uri=http://{host}", "tracking.name=mlflow", "data.retries=0"
        )
        for words in commands(run).values():
            main(words)
        assert came == []
        said = capsys.readouterr()
        assert f"nothing was sent to MLflow (tracking.uri 'http://{host}'): {REFUSED}. --trust sends it." in said.out
        main(["evaluate", str(run), "--trust"])
        assert came, "it would have been noticed"


@pytest.mark.parametrize("uri", ["sqlite:////{0}/deep/x.db", pytest.param("", marks=pytest.mark.slow)])
def test_no_database_is_made_where_a_strangers_run_says(make_run: MakeRun, tmp_path: Path, uri: str) -> None:
    run = make_run("tracking.name=mlflow", *([f"tracking.uri={uri.format(tmp_path / 'outside')}"] if uri else []))
    for words in (["evaluate", str(run)], ["report", str(run)], ["export", str(run)]):
        assert main(words) == 0
    assert not (tmp_path / "outside").exists()
    assert not list(tmp_path.rglob("*.db"))


class Sent(Tracker):
    """Stands for MLflow's tracker: which store was told."""

    stores: list[str]

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        cls.stores = []

        def tell(config: Config, *arguments: Any, **more: Any) -> Sent:
            cls.stores.append(config.tracking.uri)
            return cls()

        monkeypatch.setattr(finish, "continue_tracking", tell)
        return cls.stores


def test_results_go_to_the_server_that_the_environment_names_with_its_login(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = Sent.install(monkeypatch)
    run = make_run("tracking.uri=https://mlflow.team:5000", "tracking.name=mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.team:5000")
    assert main(["report", str(run)]) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://other.team:5000")
    assert main(["report", str(run)]) == 0
    assert stores == ["https://me:secret@mlflow.team:5000"]


def test_the_users_own_runs_need_no_flag_until_somebody_changes_them(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = Sent.install(monkeypatch)
    run = make_run("tracking.uri=https://mlflow.team:5000", "tracking.name=mlflow")
    remember(Config(run_dir=str(run)))  # an attempt with other settings
    assert not open_run(run).trusted
    config = from_yaml(run / "config.yaml")
    remember(config.__class__(**{**vars(config), "run_dir": str(run)}))
    assert main(["report", str(run)]) == 0
    assert stores == ["https://mlflow.team:5000"]
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("mlflow.team", "mlflow.evil"))
    assert main(["report", str(run)]) == 0
    assert stores == ["https://mlflow.team:5000"]


def test_notes_that_others_could_have_written_are_not_believed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    config = from_yaml(run / "config.yaml")
    mine = config.__class__(**{**vars(config), "run_dir": str(run)})
    remember(mine)
    notes = tmp_path / "state" / "clae-dist" / "runs"
    assert is_remembered(run, config)
    assert notes.stat().st_mode & 0o777 == 0o700
    notes.chmod(0o770)
    assert not is_remembered(run, config)
    notes.chmod(0o700)
    elsewhere = tmp_path / "copied"
    shutil.copytree(run, elsewhere)
    assert not is_remembered(elsewhere, config)
    next(notes.iterdir()).write_text("[]")
    assert not is_remembered(run, config)


LINKS = ["report", "export", "checkpoints", "config.yaml", "report/loss.png", ".tmp-1-x"]


@pytest.mark.parametrize("name", LINKS)
def test_no_link_out_of_the_folder_is_followed(
    make_run: MakeRun, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("tracking.name=none")
    outside, link = tmp_path / "outside", run / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        shutil.move(link, outside)
    elif name.endswith((".png", ".json", "-x")):
        outside.write_text("precious")
    else:
        outside.mkdir()
        (outside / "holiday.png").write_text("precious")
    before = sorted((path, path.stat().st_mtime_ns) for path in [outside, *outside.rglob("*")])
    link.symlink_to(outside)
    opening = [words for command, words in commands(run).items() if command not in ("doctor", "dry-run")]
    assert [main(words) for words in opening] == [2] * len(opening)
    assert sorted((path, path.stat().st_mtime_ns) for path in [outside, *outside.rglob("*")]) == before
    assert f"whose {name} is a symbolic link to {str(outside)!r}, outside of it" in capsys.readouterr().err


def test_the_report_deletes_no_picture_but_its_own(make_run: MakeRun) -> None:
    run = make_run("tracking.name=none")
    (run / "report").mkdir()
    for name in ("loss.png", "holiday.png"):
        (run / "report" / name).write_bytes(b"")
    assert main(["report", str(run)]) == 0
    assert not (run / "report" / "loss.png").exists()  # of an earlier report: this run has no such curve now
    assert (run / "report" / "holiday.png").exists()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step-00000007/checkpoint.json"])
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(make_run: MakeRun, name: str) -> None:
    run = make_run("tracking.name=none")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert [main(words) for words in (["evaluate", str(run)], ["report", str(run)], ["checkpoints", str(run)])] == [2, 2, 2]


def test_a_recipe_extends_regular_files_of_a_sane_size_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").write_text("#" * (1 << 21))
    for name, reason in (
        ("pipe.yaml", "it is not a plain file"),
        ("/dev/zero", "it is not a plain file"),
        ("huge.yaml", "it has more than 262,144 bytes"),
    ):
        (tmp_path / "recipe.yaml").write_text(f"extends: {name}\n")
        with pytest.raises(ConfigError, match=f"cannot be read \\({reason}"):
            read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    (tmp_path / "config.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(ConfigError, match="extends .* is not a known key"):
        from_yaml(tmp_path / "config.yaml")


def test_training_into_a_strangers_folder_follows_no_link_and_makes_it_the_users_own(
    make_run: MakeRun, tmp_path: Path, labelled_shards: Path
) -> None:
    run, recipe = make_run("tracking.name=none"), tmp_path / "recipe.yaml"
    shutil.move(run / "checkpoints", tmp_path / "theirs")
    (run / "checkpoints").symlink_to(tmp_path / "theirs")
    recipe.write_text("name: x\n")
    line = [
        "train",
        str(recipe),
        f"run_dir={run}",
        f"data.shards={labelled_shards}",
        "launch.workers=1",
        "batch.global_size=32",
        "seed=9",
    ]
    line += ["data.image_size=16", "model.encoder=small_resnet"]
    assert main(line) == 2
    assert not list((tmp_path / "state").rglob("*.json"))
    assert main([*line, "--trust"]) == 2  # of another configuration
    assert len(list((tmp_path / "state").rglob("*.json"))) == 1


def test_credentials_of_one_server_are_not_sent_to_another_that_a_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mine:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary")
    (tmp_path / "recipe.yaml").write_text("tracking:\n  uri: https://theirs:5000\n")
    line = ["train", str(tmp_path / "recipe.yaml"), f"run_dir={tmp_path / 'run'}"]
    assert main(line) == 2
    assert (
        "but MLFLOW_TRACKING_TOKEN in the environment is for MLFLOW_TRACKING_URI, 'https://mine:5000'"
        in capsys.readouterr().err
    )
    for more in (["tracking.uri=https://theirs:5000"], ["tracking.uri="], ["tracking.name=none"]):
        main([*line, *more])
        assert "canary" not in (said := capsys.readouterr().err)
        assert "data.shards is ''" in said


@pytest.mark.slow
def test_every_entry_of_a_run_is_known(tmp_path: Path, labelled_shards: Path) -> None:
    """A new file of a run must be among those that are looked at."""
    from clae_dist.launchers import claim, start

    fast = Evaluation(linear_iterations=1, linear_penalty=1.0)
    config = small_run(labelled_shards, tmp_path / "run", train=Train(epochs=0.2, knn_every=0), evaluation=fast)
    assert claim(config) == ""
    assert start(Recipe(config)).code == 0
    finish.evaluate(finish.Request(str(tmp_path / "run")), say=lambda text: None)
    finish.report(tmp_path / "run", say=lambda text: None)
    finish.export(tmp_path / "run", say=lambda text: None)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= FILES | FOLDERS
    assert open_run(tmp_path / "run", Permission()).trusted
    assert json.loads(next((tmp_path / "state").rglob("*.json")).read_text())["run_dir"] == str(tmp_path / "run")
