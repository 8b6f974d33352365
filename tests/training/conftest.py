from __future__ import annotations

from collections.abc import Callable

import pytest

from clae_dist.config import Config
from clae_dist.data.manifest import Manifest
from tests.small_run import Undisturbed
from tests.training.disturbed import SETTINGS, recipe


@pytest.fixture
def finished_run(undisturbed: Undisturbed, shards: Manifest) -> Callable[[int], Config]:
    """The configuration of a run that nothing disturbed, by world size."""
    return lambda world_size: recipe(shards, undisturbed(world_size, **SETTINGS))
