"""Odd environments and odd arguments of the scripts end in a line, not in a traceback."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from clae_dist.cli import main
from clae_dist.config import Config, Tracking
from clae_dist.errors import ConfigError
from clae_dist.launchers.environment import check_interface, check_ranks
from clae_dist.tracking import check_tracking
from tests import processes
from tests.processes import ROOT, Completed

RECIPE = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment; expected an integer from 1."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "", "RANK": "0"}, "LOCAL_RANK is ''"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but RANK is not set."),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment, but WORLD_SIZE is 2."),
    ],
)
def test_ranks_that_cannot_be(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", RECIPE]) == 2
    assert says in capsys.readouterr().err
    assert main(["config", RECIPE]) == 0  # which has no ranks


def test_ranks_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ranks()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    check_ranks()


def test_an_interface_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    check_interface()
    here = socket.if_nameindex()[0][1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", here)
    check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{here},nowhere7")
    with pytest.raises(
        ConfigError, match=rf"GLOO_SOCKET_IFNAME is '{here},nowhere7' .* no interface nowhere7; unset it, or name"
    ):
        check_interface()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_a_shell_has_closed(closed: str, tmp_path: Path) -> None:
    """The file that was opened next was taken for stdout."""
    line = f"exec {sys.executable} -m clae_dist config {RECIPE} {closed}"
    done = processes.run("bash", "-c", line, capture_output=False)
    assert done.returncode == 0


@pytest.mark.parametrize("odd", ["what?", "50%", "a#b"])
def test_a_database_whose_path_means_another_in_a_url(odd: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a meaning of its own in a URL"):
        check_tracking(Config(), tmp_path / odd / "run")
    check_tracking(Config(tracking=Tracking(name="none")), tmp_path / odd / "run")


# ---- scripts ----


def script(name: str, *words: str) -> Completed:
    return processes.run("bash", ROOT / "launch" / name, *words, env=processes.environment(CLAE_ENV=sys.prefix))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("env.sh", 'source "$(./launch/env.sh | tail -1)/bin/activate"'),
        ("test.sh", "arguments are passed to pytest"),
        ("hosts.sh", "See their --help."),
        ("torchrun.sh", "usage:"),
        ("ray-cluster.sh", "usage:"),
        ("quickstart.sh", "usage:"),
    ],
)
def test_every_script_has_help(name: str, says: str) -> None:
    """env.sh and test.sh did their work instead."""
    done = script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert says in done.stdout
    assert "set -euo" not in done.stdout


def test_env_refuses_what_it_does_not_know() -> None:
    done = script("env.sh", "--python")
    assert (done.returncode, done.stderr) == (2, "env: --python is not an option; see --help.\n")


@pytest.mark.parametrize(
    ("head", "code", "says"),
    [
        ("nowhere.invalid", 0, "--rdzv-endpoint=nowhere.invalid:29500"),
        ("127.0.0.1:29519", 0, "--rdzv-endpoint=127.0.0.1:29519"),
        ("127.0.0.1:99999", 2, "the port of --head is 99999; use 1 to 65535."),
        ("127.0.0.1:x", 2, "the port of --head is 'x'"),
        ("[::1]:29519", 0, r"--rdzv-endpoint=\[::1\]:29519"),
        ("::1", 0, r"--rdzv-endpoint=\[::1\]:29500"),
        (":29500", 2, "names no host"),
    ],
)
def test_where_the_hosts_of_torchrun_meet(head: str, code: int, says: str) -> None:
    done = script("torchrun.sh", "--nodes", "2", "--ranks-per-node", "1", "--head", head, "--dry-run", RECIPE)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
