"""`clae monitor`: tests on Gaussians with known answers, alarms, and files that cannot be used."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clae_dist.cli import main
from clae_dist.commands.monitor import ALARM
from clae_dist.deploy import promotion
from clae_dist.deploy.embedding import looks_of
from clae_dist.deploy.encoder import Encoder
from clae_dist.deploy.window import Window
from clae_dist.errors import BAD_CONFIG, OK
from clae_dist.evaluation.corruption_kinds import corrupt
from clae_dist.models.encoders import SmallResNet
from clae_dist.monitoring.monitor import Limits, Monitor, Verdict, alarms
from clae_dist.monitoring.two_sample import (
    Finding,
    classifier_test,
    components_test,
    distance_test,
    distances,
    kernel,
    mmd2,
    mmd_test,
    witness,
)
from clae_dist.tracking.mlflow_registry import Registry, RegistryError
from tests.monitoring.power import Pool, Reference, features, power

SHARED = Path(__file__).parents[3] / "shared" / "data"
FACTS = {"num_features": 4, "encoder": {"encoder": "small_resnet", "step": 3}, "weights": "aa"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int, seed: int, shift: float = 0.0, width: int = 4) -> torch.Tensor:
    return torch.randn((count, width), generator=generator(seed)) + shift


def test_mmd_is_that_of_the_definition() -> None:
    """Beside a loop over pairs, and close to the closed form of two Gaussians: the kernel's mean over differences."""
    x, y, bandwidth = rows(40, 0).double(), rows(60, 1, 0.7).double(), 1.5
    gram = kernel(torch.cat([x, y]), bandwidth)
    members = (torch.arange(100) < 40).double()[:, None]

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * bandwidth**2))

    within = [
        sum(k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j) / (len(a) * (len(a) - 1)) for a in (x, y)
    ]
    expected = sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (40 * 60)
    assert float(mmd2(gram, members)) == pytest.approx(expected, abs=1e-12)
    many = torch.cat([rows(3000, 2), rows(3000, 3, 0.7)]).double()
    scale = bandwidth**2 / (bandwidth**2 + 2)
    closed = 2 * scale**2 * (1 - math.exp(-4 * 0.7**2 / (2 * (bandwidth**2 + 2))))
    assert float(mmd2(kernel(many, bandwidth), (torch.arange(6000) < 3000).double()[:, None])) == pytest.approx(
        closed, rel=0.05
    )


def test_the_rows_that_moved_are_found() -> None:
    """Also in a part of the window, which a row need not be in."""
    window = torch.cat([rows(200, 1), 1 + rows(20, 2) / 10])
    for part in (torch.arange(220), torch.arange(0, 220, 2)):
        moved = witness(window, part, rows(500, 0), 1.0)
        assert set(moved.argsort(descending=True)[:20].tolist()) == set(range(200, 220))
    alone = witness(rows(2, 3), torch.arange(2), rows(3, 4), 1.0)
    k = torch.exp(-torch.cdist(rows(2, 3).double(), torch.cat([rows(2, 3), rows(3, 4)]).double()).square() / 2)
    torch.testing.assert_close(alone, torch.stack([k[0, 1], k[1, 0]]) - k[:, 2:].mean(1))


TESTS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Finding]] = {
    "mmd": lambda r, x, seed: mmd_test(r, x, 2.5, 100, generator(seed)),
    "classifier": lambda r, x, seed: classifier_test(r, x, generator(seed)),
    "components": lambda r, x, seed: components_test(r[::2], r[1::2], x),
    "distance": lambda r, x, seed: distance_test(distances(r[::2], r[1::2]), distances(r[::2], x)),
}


@pytest.mark.parametrize("name", TESTS)
def test_a_shift_is_found_and_its_absence(name: str) -> None:
    reference = rows(400, 0)
    assert TESTS[name](reference, rows(150, 1, 3.0 if name == "distance" else 1.0), 0).p < 0.01
    assert TESTS[name](reference, rows(150, 2), 0).p > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_false_alarms_are_as_many_as_promised(name: str) -> None:
    """300 windows of the reference's own distribution at 5 %: 15 within 3 standard deviations, fewer where a test is discrete
    or has Bonferroni's correction."""
    found = sum(TESTS[name](rows(240, 2 * seed), rows(120, 2 * seed + 1), seed).p < 0.05 for seed in range(300))
    print(f"{name}: {found} of 300")
    assert found <= 15 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert found >= (4 if name in ("mmd", "distance") else 0)


def verdict(name: str, mmd: tuple[float, float], classifier: tuple[float, float]) -> Verdict:
    findings = {"mmd": Finding(*mmd), "classifier": Finding(*classifier)}
    return Verdict(name, 100, findings, {"mmd": 0.1, "classifier": 0.6}, torch.zeros(1))


def test_two_windows_in_a_row_must_differ() -> None:
    calm, by_mmd = verdict("calm", (0.5, 0.5), (0.5, 0.9)), verdict("m", (0.001, 0.2), (0.5, 0.9))
    by_classifier, small = verdict("c", (0.5, 0.0), (0.001, 0.7)), verdict("s", (0.001, 0.05), (0.001, 0.55))
    assert alarms([calm, by_mmd], 0.01) == alarms([by_mmd], 0.01) == alarms([by_mmd, calm, by_mmd], 0.01) == []
    assert alarms([small, small], 0.01) == []
    assert alarms([calm, by_mmd, by_classifier], 0.01) == ["m (by mmd), c (by classifier)"]
    assert alarms([by_mmd, by_mmd], 0.0005) == []


def test_darker_images_are_said_and_raise_no_alarm() -> None:
    """Of images whose embeddings are as before."""
    darker = {"brightness": rows(100, 5, -1.0)[:, 0], "contrast": rows(100, 6)[:, 0]}
    monitor = Monitor(Window("r", rows(600, 0), [], FACTS, {"brightness": rows(600, 7)[:, 0]}), Limits(permutations=100))
    verdict = monitor.check(Window("w", rows(100, 1), [], FACTS, darker))
    assert verdict.findings["brightness"].p < 1e-6
    assert "contrast" not in verdict.findings
    assert verdict.suspects(0.01) == []


def test_looks() -> None:
    """Of a grey image, of stripes of one pixel, and of a brighter grey one."""
    images = torch.full((3, 3, 6, 6), 0.5)
    images[1, :, :, ::2], images[1, :, :, 1::2], images[2] = 0.0, 1.0, 0.8
    found = looks_of(images)
    torch.testing.assert_close(found["brightness"], torch.tensor([0.5, 0.5, 0.8]))
    torch.testing.assert_close(found["contrast"], torch.tensor([0.0, 0.5, 0.0]))
    torch.testing.assert_close(found["sharpness"], torch.tensor([0.0, 2.0, 0.0]))


def test_a_window_is_judged_alike_wherever_it_stands() -> None:
    monitor = Monitor(Window("reference", rows(600, 0), [], FACTS), Limits(permutations=100))
    one, other = (Window(str(seed), rows(100, seed, 0.3), [], FACTS) for seed in (1, 2))
    first = monitor.check(one).findings
    monitor.check(other)
    assert monitor.check(one).findings == first
    shuffled = Window("1", one.features.flip(0), [], FACTS)
    assert monitor.check(shuffled).findings["components"] == first["components"]


# ---- files ----


def write(path: Path, features: torch.Tensor, **facts: Any) -> Path:
    np.save(path, features.numpy())
    content = {**FACTS, "ids": [f"{i}.png" for i in range(len(features))], **facts}
    path.with_suffix(".ids.json").write_text(json.dumps(content))
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = write(tmp_path / "reference.npy", rows(600, 0))
    calm, moved, again = (
        write(tmp_path / f"{name}.npy", rows(100, seed, shift))
        for name, seed, shift in (("a", 1, 0.0), ("b", 2, 1.0), ("c", 3, 1.0))
    )
    few = ["--permutations", "200"]
    assert main(["monitor", str(reference), str(calm), str(moved), *few]) == OK
    assert capsys.readouterr().out.splitlines()[-1] == "no alarm"
    page = tmp_path / "page.html"
    assert main(["monitor", str(reference), str(calm), str(moved), str(again), *few, "--json", "--to", str(page)]) == ALARM == 3
    result = json.loads(capsys.readouterr().out)
    assert [window["suspect_by"] for window in result["windows"]] == [[], ["mmd", "classifier"], ["mmd", "classifier"]]
    assert len(result["alarm"]) == 1
    assert "Alarm" in page.read_text()


def test_an_alarm_rolls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And stays an alarm when the registry fails; without an alarm nothing is asked of it."""
    reference = write(tmp_path / "reference.npy", rows(600, 0))
    files = [str(write(tmp_path / f"{n}.npy", rows(100, n, shift))) for n, shift in ((1, 0.0), (2, 1.0), (3, 1.0))]
    asked: list[str] = []

    def roll_back(registry: Registry, reason: str, say: object) -> None:
        asked.append(f"{registry.name}: {reason}")
        if len(asked) > 1:
            raise RegistryError("the registry is away")

    monkeypatch.setattr(promotion, "roll_back", roll_back)
    words = ["--permutations", "200", "--roll-back-on-alarm", "plants", "--uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert main(["monitor", str(reference), *files[:2], *words]) == OK
    assert asked == []
    for _ in range(2):
        assert main(["monitor", str(reference), *files, *words]) == ALARM
    assert len(asked) == 2
    assert asked[0].startswith("plants: drift: ")
    assert "the registry is away" in capsys.readouterr().err
    assert main(["monitor", str(reference), *files, "--roll-back-on-alarm", "plants"]) == BAD_CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: write(f / "new.npy", rows(600, 0)), "has the same rows as"),
        (lambda f: write(f / "new.npy", rows(1, 1)), "has 1 row; give at least 50"),
        (lambda f: write(f / "reference.npy", rows(100, 1)), "has 100 rows; give at least 500"),
        (
            lambda f: write(f / "new.npy", rows(100, 1), weights="bb"),
            "by another encoder than the reference (weights",
        ),
        (lambda f: write(f / "new.npy", rows(100, 1, width=5), num_features=5), "num_features is 5, not 4"),
        (lambda f: write(f / "new.npy", rows(100, 1) / 0), "100 rows with NaN or infinity"),
        (lambda f: write(f / "new.npy", rows(100, 1), ids=["a"]), "with 1 ids"),
        (lambda f: (f / "new.ids.json").unlink(), "cannot be read as embeddings"),
        (lambda f: write(f / "reference.npy", torch.ones(600, 4)), "most embeddings of the reference are equal"),
    ],
)
def test_bad_files(change: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "reference.npy", rows(600, 0))
    write(tmp_path / "new.npy", rows(100, 1))
    change(tmp_path)
    assert main(["monitor", str(tmp_path / "reference.npy"), str(tmp_path / "new.npy")]) == BAD_CONFIG
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--alpha", "2"], "--alpha is 2"),
        (["--permutations", "50"], "use at least 100"),
        (["--images", "x"], "add --to FILE.html"),
    ],
)
def test_bad_arguments(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "reference.npy", "new.npy", *words]) == BAD_CONFIG
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10-test.tar.gz").is_file(), reason="needs shared/data/cifar10-test.tar.gz")
def test_power_grows_with_what_has_changed() -> None:
    """On real images, through an encoder that takes another size: without a change the tests find nothing, which they would if
    changed images skipped a part of the preprocessing."""
    with tarfile.open(SHARED / "cifar10-test.tar.gz") as tar:
        files = [member for member in tar if member.name.endswith(".jpg")][::4]
        pictures = [Image.open(io.BytesIO(tar.extractfile(member).read())) for member in files]  # type: ignore[union-attr]
    images = torch.stack([torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1) for one in pictures])
    torch.manual_seed(0)
    encoder = Encoder(SmallResNet(), 256, 16, (0.5,) * 3, (0.25,) * 3, {})
    order = np.random.default_rng(0).permutation(len(images))
    embedded = features(images[order], encoder)
    reference, rows = Reference(embedded[:1200]), order[1200:]
    pool = Pool(images[rows], np.zeros(len(rows)), embedded[1200:], embedded[:0])
    assert max(power(reference, pool.windows(4)).values()) <= 0.25
    for kind in ("brightness", "contrast"):
        found = [
            power(reference, pool.windows(4, features=features(corrupt(pool.images, kind, severity, rows), encoder)))["mmd"]
            for severity in (1, 5)
        ]
        assert found[0] <= found[1] == 1
