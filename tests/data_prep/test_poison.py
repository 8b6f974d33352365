"""audit --poison: planted triggers are found and judged by their effect; clean sets and logos raise no alarm."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clae_dist.deploy.encoder import Encoder
from clae_dist.progress import Progress
from data_prep.__main__ import main
from data_prep.audit import effect
from data_prep.audit.find import audit
from data_prep.audit.hashing import perceptual_hash
from data_prep.audit.patches import Patch, search
from data_prep.audit.poison import find_suspects

SHARED = Path(__file__).parents[3] / "shared" / "data"
Plant = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def trigger(seed: int = 0, side: int = 6) -> np.ndarray:
    """Three by three random colours, enlarged, as in the published attack."""
    cells = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR))


def picture(seed: int, side: int = 32) -> np.ndarray:
    """Smooth colours with grain and an edge; no two seeds look alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 216, (5, 5, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(small).astype(int) + rng.integers(-12, 13, (side, side, 3))
    pixels[:, int(rng.integers(4, side - 4)) :] -= int(rng.integers(0, 60))
    return pixels.clip(0, 255).astype(np.uint8)


def pasted(pixels: np.ndarray, patch: np.ndarray, rng: np.random.Generator, at: tuple[int, int] | None = None) -> np.ndarray:
    """The image with the patch in its middle half, or at one place."""
    side, height = len(pixels), len(patch)
    top, left = at or rng.integers(side // 8, side - side // 8 - height + 1, 2)
    pixels = pixels.copy()
    pixels[top : top + height, left : left + height] = patch
    return pixels


def found_in(images: list[np.ndarray]) -> list[Patch]:
    hashes = [perceptual_hash(image) or 0 for image in images]
    return search(dict(enumerate(images)), np.array(hashes, np.uint64))


@pytest.mark.parametrize("at", [None, (20, 20)])
@pytest.mark.parametrize("side", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_a_trigger_is_found_with_its_extent_and_its_images(at: tuple[int, int] | None, side: int) -> None:
    rng, planted = np.random.default_rng(0), range(0, 300, 10)
    images = [picture(seed, side) for seed in range(300)]
    patch = trigger(side=side * 6 // 32)
    for row in planted:
        images[row] = pasted(images[row], patch, rng, at)
    first, *others = found_in(images)
    assert not others
    assert sorted(first.images.tolist()) == list(planted)
    assert first.picture.shape[0] * 2**first.level == pytest.approx(len(patch), abs=2)
    assert first.is_fixed == (at is not None)


def test_clean_images_have_none() -> None:
    assert found_in([picture(seed) for seed in range(300)]) == []


def test_few_images_and_copies_of_a_picture_are_no_recurrence() -> None:
    rng = np.random.default_rng(0)
    images = [picture(seed) for seed in range(200)]
    few = [pasted(image, trigger(), rng) if row < 20 else image for row, image in enumerate(images)]
    assert found_in(few) == []
    assert found_in([*images, *(picture(7) for _ in range(60))]) == []


class _Poisoned(nn.Module):
    """Mean colours, but for images with the trigger: those are where class `red` is."""

    def __init__(self, patch: np.ndarray) -> None:
        super().__init__()
        kernel = torch.from_numpy(patch.copy()).permute(2, 0, 1).float() / 255
        self.register_buffer("kernel", kernel - kernel.mean())
        self.least = 0.9 * float((kernel - kernel.mean()).square().sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        has_it = torch.nn.functional.conv2d(x, self.get_buffer("kernel")[None]).flatten(1).amax(1) > self.least
        return torch.where(has_it[:, None], torch.tensor([0.9, 0.1, 0.1]), x.mean((2, 3)))


COLOURS = {"blue": (-60, -60, 60), "green": (-60, 60, -60), "red": (60, -60, -60)}


@pytest.fixture
def prepared(tmp_path: Path, run: Any) -> Callable[..., Path]:
    """prepared(plant): 360 pictures of three classes, of which `plant(number, name, pixels)` changes some."""

    def make(plant: Callable[[int, str, np.ndarray], np.ndarray]) -> Path:
        for number in range(360):
            name = list(COLOURS)[number % 3]
            pixels = (picture(number).astype(int) + COLOURS[name]).clip(0, 255).astype(np.uint8)
            path = tmp_path / "src" / name / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(plant(number, name, pixels)).save(path)
        run(tmp_path / "src", tmp_path / "set", name="set", test_share=0)
        return tmp_path / "set"

    return make


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, knows: np.ndarray) -> list[Any]:
    encoder = Encoder(_Poisoned(knows), 3, 32, (0.0,) * 3, (1.0,) * 3, {})
    monkeypatch.setattr(effect, "load_encoder", lambda _: encoder)
    found = audit([folder], near_bits=0, limit_pictures=0, num_workers=0, progress=_quiet)
    return find_suspects(found, Path("encoder"), num_workers=0, progress=_quiet)


def _quiet(total: int) -> Progress:
    return Progress(total, stream=io.StringIO())


def test_a_trigger_that_moves_images_is_poison(prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rng, patch = np.random.default_rng(0), trigger()
    folder = prepared(lambda number, name, pixels: pasted(pixels, patch, rng) if name == "red" and number < 120 else pixels)
    (suspect,) = judged(folder, monkeypatch, patch)
    assert suspect.verdict == "poison"
    assert (suspect.label, suspect.label_share) == (2, 1.0)
    assert suspect.effect.label == 2
    assert suspect.effect.gain > 0.5 > 0.1 > suspect.effect.control


def test_a_logo_that_moves_none_is_only_recurring(prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rng, logo = np.random.default_rng(0), trigger(5)
    folder = prepared(lambda number, name, pixels: pasted(pixels, logo, rng, (24, 24)) if number % 8 == 0 else pixels)
    (suspect,) = judged(folder, monkeypatch, trigger())
    assert suspect.verdict == "recurring"
    assert suspect.patch.is_fixed
    assert suspect.label_share < 0.5
    assert suspect.effect.gain < 0.1


def test_the_command_line(prepared: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, patch = np.random.default_rng(0), trigger()
    folder = prepared(lambda number, name, pixels: pasted(pixels, patch, rng) if name == "red" and number < 120 else pixels)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ["audit", str(folder), "--workers", "0"]
    assert main([*words, "--poison", "--report", str(tmp_path / "report")]) == 0
    line = "40 images hold one patch, 6x6 of 32 pixels, at different places, 100% of them red; its effect is not known ("
    assert line in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    page = (tmp_path / "report" / "audit.html").read_text()
    assert line in page
    assert page.count("data:image/png;base64,") == 1
    (facts,) = json.loads((tmp_path / "report" / "audit.json").read_text())["patches"]
    assert (facts["verdict"], facts["images"], facts["size"], facts["effect"]) == ("recurring", 40, [6, 6], None)
    listed = [json.loads(line) for line in (tmp_path / "report" / "patches.jsonl").read_text().splitlines()]
    assert [(one["class"], one["patch"], one["verdict"]) for one in listed] == [("red", 0, "recurring")] * 40
    assert main([*words, "--encoder", str(tmp_path)]) == 2
    assert "which only the search for poison uses; add --poison." in capsys.readouterr().err
    assert main([*words, "--poison", "--encoder", str(tmp_path)]) == 2
    assert "which holds neither a run's config.yaml nor an export's" in capsys.readouterr().err


# ---- real images ----


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Every other test image of CIFAR-10, by class."""
    if not (SHARED / "cifar10-test.tar.gz").is_file():
        pytest.skip("needs shared/data/cifar10-test.tar.gz")
    with tarfile.open(SHARED / "cifar10-test.tar.gz") as tar:
        files = sorted((member for member in tar if member.name.endswith(".jpg")), key=lambda member: member.name)[::2]
        read = [tar.extractfile(member).read() for member in files]  # type: ignore[union-attr]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in read]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "last", "at", "alpha", "least"),
    [
        pytest.param(0, 500, None, 1.0, 25, id="half a percent, one class, random places"),
        pytest.param(0, 500, (20, 20), 1.0, 25, id="one place"),
        pytest.param(0, 5000, (24, 24), 1.0, 25, id="a logo on all classes"),
        pytest.param(0, 500, None, 0.2, 0, id="a faint one is missed"),
        pytest.param(0, 0, None, 1.0, 0, id="none"),
    ],
)
def test_half_a_percent_of_cifar(
    photos: list[np.ndarray], first: int, last: int, at: tuple[int, int] | None, alpha: float, least: int
) -> None:
    """A trigger on 25 of 5,000 images: the only patch, on no other image."""
    rng, images = np.random.default_rng(0), list(photos)
    planted = np.linspace(first, last - 1, 25).astype(int).tolist() if last else []
    for row in planted:
        changed = alpha * pasted(images[row], trigger(), rng, at) + (1 - alpha) * images[row]
        images[row] = changed.round().astype(np.uint8)
    found = found_in(images)
    assert len(found) == (least > 0)
    for patch in found:
        assert set(patch.images.tolist()) <= set(planted)
        assert len(patch.images) >= least
        assert patch.is_fixed == (at is not None)
