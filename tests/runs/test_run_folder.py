"""A run folder whose run.json is gone or damaged: the way out that the error names works, and checks what can be checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clae_dist.data.synthetic import write_synthetic_set
from clae_dist.errors import ConfigError
from clae_dist.recipe import Recipe
from clae_dist.runs.claim import open_run_folder
from clae_dist.runs.folder import RunFolder
from clae_dist.world import World
from tests.small_run import small_run


def test_a_run_json_that_was_deleted_is_written_again_for_the_same_settings_alone(tmp_path: Path) -> None:
    manifest, world = write_synthetic_set(tmp_path / "shards", 30, 16), World.single("cpu")
    config = small_run(tmp_path / "shards", tmp_path / "run")
    before = open_run_folder(Recipe(config), manifest, world, "one")
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_bytes(b"")  # a power cut
    with pytest.raises(ConfigError, match="run.json is damaged .it is empty.; restore it from a copy, or delete it"):
        open_run_folder(Recipe(config), manifest, world, "two")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ConfigError, match="belongs to another configuration: seed was 0 and is 1"):
        open_run_folder(Recipe(replace(config, seed=1)), manifest, world, "two")
    open_run_folder(Recipe(config), manifest, world, "two")
    after = RunFolder(tmp_path / "run").read_identity()
    assert (after.run_key, after.manifest_digest) == ("two", before.manifest_digest)
