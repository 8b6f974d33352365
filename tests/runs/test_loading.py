"""What loading takes and deleting leaves: every file is checked by some rank, the average is what evaluation sees."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clae_dist.config import Config, Data, Model, Train
from clae_dist.models import build_model
from clae_dist.recipe import to_yaml
from clae_dist.runs.checkpoint import load_checkpoint, load_model, remove_leftovers
from clae_dist.runs.checkpoint.write import delete_folder
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World
from tests.checkpoints import write_checkpoint
from tests.ranks import RankPool

WEIGHTS = {f"model/w{i}": torch.full((100,), float(i)) for i in range(8)}


def load(world: World, run_dir: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    checkpoint = load_checkpoint(run_dir, said.append, world)
    return (-1 if checkpoint is None else checkpoint.step), said


@pytest.mark.parametrize("damaged", range(4))
def test_ranks_check_all_files_between_them(ranks: RankPool, tmp_path: Path, damaged: int) -> None:
    """Four files, two ranks: a flipped byte in any of them is found, and all ranks take the checkpoint before."""
    write_checkpoint(tmp_path, 1, WEIGHTS, 4)
    newest = write_checkpoint(tmp_path, 2, WEIGHTS, 4) / f"rank-{damaged:05d}.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    for step, said in ranks.run(2, load, tmp_path):
        assert step == 1
        assert f"is damaged: rank-{damaged:05d}.safetensors has sha256" in said[0]


def test_an_averaged_encoder_is_what_is_evaluated(tmp_path: Path) -> None:
    config = Config(data=Data(image_size=16), model=Model(encoder="small_resnet", projector_dim=8), train=Train(ema_decay=0.9))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    model = build_model(config)
    state = {f"model/{name}": value for name, value in model.state_dict().items()}
    average = {f"average/{name}": value + 1 for name, value in model.named_parameters()}
    write_checkpoint(tmp_path, 3, {**state, **{name: value.detach() for name, value in average.items()}})
    loaded = load_model(tmp_path)[1]
    for name, value in loaded.named_parameters():
        assert torch.equal(value, average[f"average/{name}"]), name
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name  # buffers are not averaged


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while it is deleted leaves nothing that looks like a checkpoint, or like one that is damaged."""
    path = write_checkpoint(tmp_path, 5, WEIGHTS, 2)
    rmtree = shutil.rmtree

    def killed(folder: Path, *arguments: Any, **settings: Any) -> None:
        if folder.exists():
            next(file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_folder(path)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert RunFolder(tmp_path).find_checkpoints() == []
    remove_leftovers(tmp_path)
    assert list(path.parent.iterdir()) == []
