"""The Triton kernels of the augmentation, interpreted and compiled on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests import processes

pytest.importorskip("triton")


def facts(*arguments: str) -> dict[str, Any]:
    interpreted = processes.environment(TRITON_INTERPRET="1")
    done = processes.run(sys.executable, "-m", "tests.data.fused_augmentation", *arguments, env=interpreted)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("arguments", [(), pytest.param(("thorough",), marks=pytest.mark.slow)])
def test_fused_equals_the_grouped_augmentation_and_moves_few_bytes(arguments: tuple[str, ...]) -> None:
    found = facts(*arguments)
    assert max(found["largest differences"].values()) < 1e-5, found  # float32, beside float64
    assert found["mean of the unchanged image"] > 1e-3
    for kind, times in found["bytes"].items():
        assert times <= 2, kind


@pytest.mark.parametrize("capability", [pytest.param(70, marks=pytest.mark.slow), 90])
def test_kernels_compile_without_spilled_registers(capability: int) -> None:
    done = processes.run(sys.executable, "-m", "tests.data.compiled_augmentation", str(capability))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"_grey_means": 0, "_augment_tiles": 0}
