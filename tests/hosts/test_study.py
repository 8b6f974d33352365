"""A study on a Ray cluster: its cells run side by side on the hosts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clae_dist.data.manifest import Manifest
from clae_dist.runs.folder import RunFolder
from tests.hosts.cluster import Hosts
from tests.hosts.ray_cluster import RayCluster
from tests.processes import finish
from tests.studies.conftest import RECIPE, STUDY

pytest.importorskip("ray")


@pytest.mark.slow
def test_cells_share_the_hosts(hosts: Hosts, tmp_path: Path, shards: Manifest) -> None:
    """Three hosts of one core: three cells of one rank at a time, the fourth when one of them has ended."""
    (tmp_path / "small.yaml").write_text(RECIPE.format(shards=shards.folder))
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY.replace("1000", "6000") + f"folder: {tmp_path / 'study'}\n")
    with RayCluster(hosts) as cluster:
        env = {
            "RAY_ADDRESS": f"{hosts.address(0)}:6379",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(cluster.token),
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        command = [sys.executable, "-m", "clae_dist", "study", str(path), "launch.launcher=ray"]
        code, output = finish(hosts.popen(0, command, env))
    assert code == 0, output
    assert "4 cells, all finished" in output
    spans = []
    for folder in sorted((tmp_path / "study").glob("*/seed-*")):
        lines = [json.loads(line) for line in RunFolder(folder).goodput_file.read_text().splitlines()]
        spans.append((lines[0]["at"], lines[-1]["at"]))
    assert len(spans) == 4
    overlapping = [
        sum(begun < other_ended and other_begun < ended for other_begun, other_ended in spans) for begun, ended in spans
    ]
    assert max(overlapping) >= 2  # a run and at least one other
