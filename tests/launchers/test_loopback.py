"""What a run on one machine opens cannot be reached from another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ray.train.torch import config as ray_config

from clae_dist.errors import OK, ConfigError
from clae_dist.launchers import ray_local
from clae_dist.launchers.local import spawn
from clae_dist.launchers.loopback import loopback_store, use_loopback
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.ray_security import check_version, secure_ray
from clae_dist.world import connect


def listens() -> set[str]:
    """Addresses (as /proc writes them) on which this process listens."""
    mine = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(descriptor))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.add(fields[1].rpartition(":")[0])
    return found


def loopback(address: str) -> bool:
    return address in ("0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F")


def test_the_store_of_local_ranks_is_on_loopback_alone() -> None:
    before = listens()
    store = loopback_store()
    assert listens() - before <= {"0100007F"}
    assert "0100007F" in listens()
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False)
    client.set("a", "b")
    assert store.get("a") == b"b"
    everywhere = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert not all(map(loopback, listens())), "else this test sees nothing"
    del everywhere


def _says_where_it_listens() -> Ending:
    with connect() as world:
        told = world.gather_objects((sorted(listens()), os.environ.get("GLOO_SOCKET_IFNAME")))
    return Ending(OK, json.dumps(told))


def test_local_ranks_open_nothing_but_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    told = json.loads(spawn(2, _says_where_it_listens).message)
    assert [interface for _, interface in told] == ["lo", "lo"]
    assert all(addresses and all(map(loopback, addresses)) for addresses, _ in told), told


def test_an_interface_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    use_loopback()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "")


def test_the_first_worker_of_a_local_ray_serves_a_store_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also guards against a Ray that asks its workers for an address in another way."""
    monkeypatch.setattr(ray_config.ray, "get", lambda futures: futures)
    monkeypatch.setattr(ray_local, "_KEPT", [])
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    called: list[str] = []

    class Workers:
        """Two workers, both of them this process; what needs a real one is not run."""

        def __len__(self) -> int:
            return 2

        def execute(self, function: Callable[..., Any], **settings: Any) -> None:
            if function is not ray_config._set_torch_distributed_env_vars:
                function(**settings)

        def execute_single(self, index: int, function: Callable[..., Any]) -> Any:
            return function()

        def execute_single_async(self, index: int, function: Callable[..., Any], **settings: Any) -> None:
            called.append(f"{function.__name__} {settings['init_method']}")

    config = ray_local.LoopbackTorchConfig(backend="gloo")
    before = listens()
    config.backend_cls().on_start(Workers(), config)
    assert listens() - before <= {"0100007F"}
    assert called == ["_setup_torch_process_group env://"] * 2
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", str(ray_local._KEPT[0].port))
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"


@pytest.fixture
def _ray_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "CLAE_RAY_WITHOUT_TOKEN"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("_ray_environment")
@pytest.mark.parametrize("mode", ["", "disabled", "token"])
def test_a_ray_of_this_machine_has_a_token_whatever_the_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    secure_ray()
    assert os.environ.get("RAY_AUTH_MODE", "token") == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.usefixtures("_ray_environment")
def test_a_cluster_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="there is no token"):
        secure_ray()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    secure_ray()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is 'disabled'"):
        secure_ray()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    secure_ray()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("CLAE_RAY_WITHOUT_TOKEN", "yes")
    secure_ray()


@pytest.mark.parametrize(("version", "fine"), [("2.60.0", True), ("3.0.0.dev0", True), ("2.59.3", False), ("2.9", False)])
def test_versions_of_ray_without_tokens_are_refused(version: str, fine: bool) -> None:
    if fine:
        check_version(version)
    else:
        with pytest.raises(ConfigError, match=f"Ray is {version}, whose clusters may have no token"):
            check_version(version)
