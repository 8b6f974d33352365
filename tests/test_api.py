"""`import clae_dist`: the names, and the example of clae_dist/README.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clae_dist
from clae_dist import errors
from clae_dist.config import Config
from tests import processes
from tests.processes import ROOT, Completed


def run_python(code: str, folder: Path) -> Completed:
    """A script without a guard around its work, run from `folder`."""
    script = folder / "script.py"
    script.write_text(code)
    return processes.run(sys.executable, script, cwd=folder)


def test_importing_takes_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = """
import sys
import clae_dist
clae_dist.load_config("quickstart", {"train.epochs": 2})
try:
    clae_dist.load_config("quickstart", {"train.epoch": 2})
except clae_dist.ConfigError as error:
    print(error)
print([name for name in ("torch", "numpy", "PIL") if name in sys.modules])
"""
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train.epoch (overrides) is not a known key; did you mean train.epochs?" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_every_name_is_there_and_documented() -> None:
    assert set(dir(clae_dist)) == {*clae_dist.__all__, "__version__"}
    readme = (ROOT / "clae_dist" / "README.md").read_text()
    for name in clae_dist.__all__:
        assert getattr(clae_dist, name).__doc__, name
        assert name in readme or name == "Encoder", name
    with pytest.raises(AttributeError, match="module 'clae_dist' has no attribute 'tran'"):
        clae_dist.tran  # noqa: B018


def test_overrides_are_values_of_python(tmp_path: Path) -> None:
    overrides = {"data.shards": tmp_path, "augment.crop_scale": (0.5, 1.0), "train.epochs": 30, "data.metadata": ["json"]}
    config = clae_dist.load_config(None, overrides)
    assert (config.data.shards, config.augment.crop_scale, config.train.epochs) == (str(tmp_path), (0.5, 1.0), 30.0)
    assert config.data.metadata == ("json",)
    assert clae_dist.load_config() == Config()
    with pytest.raises(clae_dist.ConfigError, match=r"batch\.global_size is 'many' \(overrides\)"):
        clae_dist.load_config(overrides={"batch.global_size": "many"})
    with pytest.raises(clae_dist.ConfigError, match="'nowhere', which is neither a file nor the name of a recipe"):
        clae_dist.load_config("nowhere")


def test_train_raises_what_a_command_would_exit_with(tmp_path: Path) -> None:
    config = clae_dist.load_config(overrides={"run_dir": tmp_path / "run", "launch.launcher": "local", "tracking.name": "none"})
    with pytest.raises(clae_dist.ConfigError, match=r"data\.shards is ''; name a folder of shards"):
        clae_dist.train(config)
    with pytest.raises(clae_dist.DataError, match="is empty; name the folder"):
        clae_dist.train(clae_dist.load_config(overrides={"data.shards": tmp_path, "run_dir": tmp_path / "run"}))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errors.BAD_CONFIG, errors.ConfigError),
        (errors.BAD_DATA, errors.DataError),
        (errors.STORAGE, errors.CheckpointError),
        (errors.FAILED, errors.RankError),
        (errors.HUNG, errors.RankError),
        (errors.UNEXPECTED, errors.RankError),
    ],
)
def test_the_end_of_ranks_as_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[errors.ClaeError]
) -> None:
    from clae_dist import launchers
    from clae_dist.launchers.rank import Ending

    monkeypatch.setattr(launchers, "claim", lambda config, trust: "")
    monkeypatch.setattr(launchers, "start", lambda recipe: Ending(code, "rank 1 of 2: it broke"))
    config = clae_dist.load_config(overrides={"run_dir": tmp_path})
    with pytest.raises(error, match="rank 1 of 2: it broke"):
        clae_dist.train(config)
    monkeypatch.setattr(launchers, "start", lambda recipe: Ending(errors.STOPPED, ""))
    assert clae_dist.train(config) == clae_dist.TrainResult(config.folder, finished=False)


@pytest.mark.slow
def test_the_readmes_example(tmp_path: Path) -> None:
    """As a script, whose two ranks must not run it again."""
    from data_prep.__main__ import main as data_prep

    generator = np.random.default_rng(0)
    for number in range(330):
        split = "train" if number < 270 else "test"
        path = tmp_path / "images" / split / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[:, :, number % 3] += 110
        Image.fromarray(pixels).save(path)
    assert data_prep(["prepare", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "clae_dist" / "README.md").read_text(), re.DOTALL)
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("features: (330, 256) float32") == 1
    assert re.search(r"kNN accuracy before and after: \{'before': [\d.]+, 'after': [\d.]+\}", result.stdout)
    assert re.search(r"batch: \(60, 256\) \[\d, \d, \d\] \[0, 1, 2\]", result.stdout)
    assert result.stdout.count("finished: ") == 1
