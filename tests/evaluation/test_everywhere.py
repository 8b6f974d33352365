"""`clae evaluate` of runs, exports and published weights, on one rank and several, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.cli import main
from clae_dist.config import Config
from clae_dist.deploy.export import export_encoder
from clae_dist.errors import ConfigError
from clae_dist.evaluation.evaluate import evaluate, evaluate_run
from clae_dist.evaluation.examined import examined_run
from clae_dist.evaluation.place import Place
from clae_dist.evaluation.suite import make_suite
from clae_dist.models import build_model
from clae_dist.recipe import from_yaml
from clae_dist.training import finish
from clae_dist.world import World
from tests import processes
from tests.checkpoints import write_checkpoint
from tests.processes import CLAE, clae, read_until, started
from tests.processes import finish as ended

MakeRun = Callable[..., Path]
ROBUST = ("robust.images=8", "robust.batch=4", "robust.curve=[0.01]", "robust.steps=3", "robust.attacks=[fgsm, pgd]")
# AutoAttack costs thousands of passes an image that stands it: at this ε none does.
AUTOATTACK = ("robust.images=4", "robust.batch=2", "robust.curve=[]", "robust.attacks=[autoattack]", "robust.epsilon=0.5")


def _quiet(_: str) -> None: ...


def _without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "wall_s"}


def _on_ranks(world: World, run: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    suite = make_suite("knn,linear,robust", overrides)
    return _without_times(evaluate(examined_run(Path(run)), suite, world, _quiet, fresh=True))


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(make_run: MakeRun, ranks: Any) -> None:
    """Features, and every verdict of every attack; a head that is trained on all ranks as well."""
    run = make_run("evaluation.batch_size=16")
    overrides = (*ROBUST, "robust.heads=[slf, alf]", "robust.epochs=1")
    one, two = (ranks.run(count, _on_ranks, str(run), overrides) for count in (1, 2))
    assert two[0] == two[1]
    assert set(one[0]["results"]) == {"knn", "linear", "robust"}
    for protocol, metrics in one[0]["results"].items():
        for metric, values in metrics.items():
            assert two[0]["results"][protocol][metric] == pytest.approx(values, abs=1e-4), (protocol, metric)
    robust = one[0]["results"]["robust"]
    assert next(iter(robust)) == "slf_pgd"
    for when in ("before", "after"):
        assert robust["slf_clean"][when] > 60
        assert robust["slf_fgsm"][when] <= robust["slf_clean"][when]
        assert robust["slf_masked"][when] == 0


def _units_of_this_rank(world: World, folder: str, uneven: bool) -> tuple[list[int], list[int]]:
    """Units that this rank worked on, and those in the journal. With `uneven`, rank 1 has not finished a unit before rank 0
    has finished six, which it does not start before rank 1 has one."""
    no_images: Any = None
    place = Place(world, Path(folder), Config(), no_images, _quiet)
    mine: list[int] = []
    store = world.group.get_group_store()  # type: ignore[union-attr]

    def work(numbers: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        for number in numbers:
            mine.append(number)
            store.add(f"{folder} started on {world.rank}", 1)
            awaited, least = ("done", 6) if world.rank else ("started on 1", 1)
            while uneven and store.add(f"{folder} {awaited}", 0) < least:
                time.sleep(0.01)
            yield {"number": torch.tensor([number])}
            store.add(f"{folder} done", 1)

    guess = dict(enumerate((1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0)))
    journal = place.shared({"test": 1}, 7, work, "units", costs=(lambda _: guess) if uneven else None)
    return mine, [int(tensors["number"]) for _, tensors in journal]


def test_a_rank_with_a_long_unit_leaves_the_others_to_the_rest(ranks: Any, tmp_path: Path) -> None:
    """By turns, rank 1 would get three of seven units."""
    (first, all_units), (second, _) = ranks.run(2, _units_of_this_rank, str(tmp_path / "turns"), False)
    assert (first, second, all_units) == ([0, 2, 4, 6], [1, 3, 5], [0, 1, 2, 3, 4, 5, 6])
    (first, all_units), (second, _) = ranks.run(2, _units_of_this_rank, str(tmp_path / "free"), True)
    assert len(second) == 1
    assert {first[0], *second} == {3, 6}  # the dearest first
    assert sorted(first + second) == all_units == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_evaluation_continues(make_run: MakeRun, tmp_path: Path) -> None:
    """kill -9 in the middle of the attacks: what is finished is not computed again, and the results are the same."""
    run, reference = (make_run("method.name=simclr", run_dir=tmp_path / name) for name in ("run", "reference"))
    command = ("--threads", 1, "--suite", "knn,robust", "robust.images=8", "robust.batch=1", "robust.attacks=[fgsm, pgd]")
    with started(*CLAE, "evaluate", run, *command) as process:
        read_until(process, "kNN after pretraining")
        journals = run / "evaluation" / "journals"
        while not [path for path in journals.glob("*/*.part") if path.stat().st_size > 600]:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert ended(process)[0] == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in journals.glob("*/*.part")}
    code, output = _evaluated(run, *command)
    assert code == 0, output
    assert "kNN: the results of the same evaluation before are kept" in output
    assert kept
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert _evaluated(reference, *command)[0] == 0
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, reference))
    assert found["results"] == expected["results"]


def _evaluated(run: Path, *words: Any) -> tuple[int, str]:
    with started(*CLAE, "evaluate", run, *words) as process:
        return ended(process)


def test_results_of_other_protocols_stay(make_run: MakeRun) -> None:
    run = make_run()
    first = evaluate_run(run, _quiet)
    second = evaluate_run(run, _quiet, suite=make_suite("robust", ROBUST))
    assert {name: second["results"][name] for name in first["results"]} == first["results"]
    assert set(second["results"]) == {"knn", "linear", "robust"}


def test_an_encoder_that_has_not_changed(make_run: MakeRun) -> None:
    """Before and after share their kept features."""
    run = make_run(checkpoint=False)
    weights = build_model(from_yaml(run / "config.yaml")).state_dict()
    write_checkpoint(run, 1, {f"model/{name}": value for name, value in weights.items()})
    for values in evaluate_run(run, _quiet)["results"]["knn"].values():
        assert values["before"] == values["after"]


def test_damaged_classifiers_are_fitted_again(make_run: MakeRun) -> None:
    run = make_run()
    first = evaluate_run(run, _quiet)
    for path in (run / "evaluation" / "heads").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    (run / "evaluation.json").unlink()
    assert _without_times(evaluate_run(run, _quiet)) == _without_times(first)


def test_fresh_computes_everything_again(make_run: MakeRun) -> None:
    run, said = make_run(), []
    first = evaluate_run(run, _quiet)
    again = evaluate(examined_run(run), make_suite("knn,linear"), World.single(), said.append, fresh=True)
    assert _without_times(first) == _without_times(again)
    assert not [line for line in said if "are kept" in line]
    assert [line for line in said if line.startswith("features, train: 150 of 150")]


def test_an_export_has_the_results_of_its_run(make_run: MakeRun, labelled_shards: Path, tmp_path: Path) -> None:
    run = make_run("method.name=simclr")
    export = export_encoder(run, tmp_path / "export")
    of_run = evaluate_run(run, _quiet)
    request = finish.Request(str(export), str(labelled_shards), overrides=("evaluation.knn_k=20",))
    of_export = finish.evaluate(request, say=_quiet)
    assert of_export["results"]["knn"]["accuracy"] == {"after": of_run["results"]["knn"]["accuracy"]["after"]}
    assert (export / "evaluation.json").exists()


def test_published_weights_by_name(monkeypatch: pytest.MonkeyPatch, labelled_shards: Path, tmp_path: Path) -> None:
    import timm

    create = timm.create_model

    def published(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        torch.manual_seed(3)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", published)
    request = finish.Request(
        "timm/resnet18.a1_in1k",
        str(labelled_shards),
        str(tmp_path / "results"),
        ("data.image_size=32", "evaluation.knn_k=20"),
    )
    found = finish.evaluate(request, say=_quiet)
    assert set(found["results"]["linear"]["accuracy"]) == {"after"}
    assert json.loads((tmp_path / "results" / "evaluation.json").read_text()) == found


def test_pretrained_without_labels_and_evaluated_with(
    make_run: MakeRun, shards: Callable[..., Path], labelled_shards: Path
) -> None:
    """Accuracies on another set that has labels; on the run's own set the protocols that need none."""
    run = make_run(data=shards(labelled=False))
    elsewhere = evaluate_run(run, _quiet, str(labelled_shards))
    assert set(elsewhere["results"]) == {"knn", "linear"}
    at_home = evaluate_run(run, _quiet, suite=make_suite("knn,learnability,geometry"))
    assert set(at_home["results"]) == {"learnability", "geometry"}
    assert at_home["no_accuracies"] == "no image of train has a label"


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "SUBJECT is 'nowhere', which is neither"),
        (["timm/resnet18"], "name the images with --shards"),
        (["timm/resnet18", "--shards", "shards"], "name a folder for the results with --to"),
        (["RUN", "--suite", "robst"], "--suite has 'robst', which is no protocol; did you mean robust"),
        (
            ["RUN", "robust.images=3"],
            "robust.images is a setting of robust, which is not in the suite; use --suite knn,linear,robust",
        ),
        (["RUN", "--suite", "robust", "robust.imags=3"], "robust.imags is not a setting.*did you mean robust.images"),
        (["RUN", "--suite", "robust", "robust.images=0"], "robust.images is 0; use at least 1"),
        (["RUN", "--suite", "robust", "robust.heads=[slf, sfl]"], "robust.heads is .*; use some of slf, alf, aff"),
        (
            ["RUN", "--suite", "robust", "robust.route=adversarial"],
            "robust.route is 'adversarial', but the encoder",
        ),
        (["RUN", "optim.learning_rate=1"], "optim.learning_rate has no meaning in an evaluation"),
        (["RUN", "--launcher", "torchrun"], "RANK and WORLD_SIZE are not set"),
        (["RUN", "--workers", "-1"], "--workers is -1; use 1 or more"),
    ],
)
def test_bad_input(make_run: MakeRun, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    run = make_run("method.name=simclr")
    assert main(["evaluate", *(str(run) if word == "RUN" else word for word in words)]) == 2
    error = capsys.readouterr().err
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(error)
    assert not (run / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "torchrun", "ray"])
def test_every_launcher(make_run: MakeRun, launcher: str) -> None:
    """Two ranks find what a process alone finds, AutoAttack's verdicts included."""
    run = make_run()
    words = ("evaluate", run, "--suite", "knn,robust", "--device", "cpu", "--threads", 1, "--fresh", *AUTOATTACK)
    assert clae(*words).returncode == 0
    alone = json.loads((run / "evaluation.json").read_text())["results"]
    if launcher == "torchrun":
        program = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "clae_dist")
        found = processes.run(*program, *words, "--launcher", "torchrun")
    else:
        found = clae(*words, "--launcher", launcher, "--workers", 2)
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "evaluation.json").read_text())["results"] == alone
    assert next(iter(alone["robust"])) == "slf_autoattack"
