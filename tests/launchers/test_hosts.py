"""What the launchers for several hosts decide without any host: numbers of ranks, versions, routes, exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator_client

from clae_dist.config import Batch, Config, Data, Guard, Launch
from clae_dist.errors import BAD_CONFIG, FAILED, HUNG, OK, STOPPED, STORAGE, UNEXPECTED, ConfigError
from clae_dist.launchers import ray, start
from clae_dist.launchers.rank import Ending
from clae_dist.launchers.ray import working_sizes
from clae_dist.launchers.ray_elastic import WorkingSizes
from clae_dist.launchers.route import route_to
from clae_dist.launchers.torchrun import launch as launch_torchrun
from clae_dist.recipe import Recipe
from clae_dist.runs.folder import STOP_FILE
from clae_dist.training.guard import listen_for_stop
from clae_dist.versions import differences, host_versions
from clae_dist.world import told
from tests import processes
from tests.processes import Completed, started


def elastic(size: int, low: int, high: int) -> Config:
    return Config(batch=Batch(global_size=size), launch=Launch(launcher="ray", workers=high, min_workers=low))


@pytest.mark.parametrize(
    ("size", "low", "high", "sizes"),
    [(16, 1, 4, [1, 2, 4]), (24, 2, 4, [2, 3, 4]), (16, 3, 4, [4]), (16, 0, 4, [4])],
)
def test_only_numbers_of_workers_that_can_share_the_batch_count(size: int, low: int, high: int, sizes: list[int]) -> None:
    assert working_sizes(elastic(size, low, high)) == sizes


def test_streams_are_the_same_at_every_number_of_workers() -> None:
    """data.streams=0 chooses from the batch alone: a run that shrank reads the images that it would have read."""
    assert {replace(elastic(24, 1, 3), launch=Launch(workers=n)).num_streams for n in (1, 2, 3)} == {24}
    with pytest.raises(ConfigError, match="3 ranks"):
        working_sizes(elastic(16, 1, 3))
    with pytest.raises(ConfigError, match="data.streams is 8, which 3 ranks cannot share"):
        working_sizes(replace(elastic(24, 1, 3), data=Data(streams=8)))


def test_min_workers_is_checked_where_it_is_written() -> None:
    with pytest.raises(ConfigError, match="launch.min_workers is 5; use 0"):
        Launch(workers=4, min_workers=5)
    with pytest.raises(ConfigError, match="it is Ray's"):
        start(Recipe(Config(launch=Launch(launcher="local", workers=2, min_workers=1))))


def test_versions_differ_with_both_named() -> None:
    here = host_versions()
    assert set(here) == {"Python", "torch", "Ray", "clae-dist", "git revision"}
    assert differences(here, {**here, "Python": f"{here['Python'].rpartition('.')[0]}.99"}, "a", "b") == ""
    assert differences({**here, "torch": "2.11"}, here, "host1", "host0") == (
        f"torch is 2.11 on host1, but {here['torch']} on host0"
    )


def test_the_route_to_this_machine_is_known() -> None:
    route = route_to("127.0.0.1")
    assert (route.address, route.interface, route.is_here) == ("127.0.0.1", "lo", True)


def test_torchrun_is_not_made_to_start_again_what_would_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAE_ENDING", str(tmp_path / "ending"))
    left = tmp_path / "ending"
    for code in (UNEXPECTED, HUNG):
        assert told(code) == code
    assert not left.exists()
    for code in (
        BAD_CONFIG,
        FAILED,
        STORAGE,
        STOPPED,
        OK,
    ):  # the last start counts: the one before was stopped for a host that came
        assert told(code) == OK
        assert left.read_text() == f"{code}\n"


def test_numbers_of_hosts_that_cannot_share_a_batch_end_a_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "CLAE_NODES": "2:3"}.items():
        monkeypatch.setenv(name, value)
    assert launch_torchrun(Recipe(Config(batch=Batch(global_size=16)))) == Ending(BAD_CONFIG, "")  # rank 0 says it


def test_collectives_wait_longer_than_the_watch() -> None:
    for guard in (Guard(), Guard(hang_s=1), Guard(hang_s=5000)):
        assert guard.timeout_s > guard.limit_s(patient=True)
    assert Guard(hang_s=0).timeout_s > Guard().timeout_s  # nobody watches: nobody ends it


def test_what_scripts_show_holds_no_secrets() -> None:
    words = 'uri=postgresql://me:hidden@h/db "https://h/x.tar?token=hidden" "pipe:curl hidden u" end'
    shown = processes.run("bash", "-c", f"source launch/hosts.sh; show run {words}", check=True).stdout
    assert "hidden" not in shown
    assert shown.startswith("$ run uri=postgresql://me@h/db https://h/x.tar?… pipe:curl … end")


def test_a_schedulers_signal_is_heard_even_where_it_was_ignored(tmp_path: Path) -> None:
    """launch/torchrun.sh lets ranks start with SIGUSR1 ignored: the notice would kill one that does not listen yet."""
    code = (
        "import os, signal, sys; from pathlib import Path; from clae_dist.training.guard import listen_for_stop\n"
        "assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN\n"
        "with listen_for_stop(Path(sys.argv[1])) as stop:\n"
        "    for _ in range(3): os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    print(stop.made(), stop.reason)\n"
    )
    deaf = {"preexec_fn": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN) and None}
    done = processes.run(sys.executable, "-c", code, tmp_path, check=True, **deaf)
    assert done.stdout.split() == ["True", "SIGUSR1"]


def test_a_stop_file_says_why(tmp_path: Path) -> None:
    with listen_for_stop(tmp_path) as stop:
        assert not stop.made()
        (tmp_path / STOP_FILE).write_text("host2 will be taken away")
        assert stop.made()
        assert stop.reason == "host2 will be taken away"


def test_a_run_folder_that_hosts_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks wrote into another folder of the same name."""

    class RanksElsewhere:
        def fit(self) -> None:
            pass

    monkeypatch.setattr(ray, "RayStore", lambda: SimpleNamespace(take=lambda name: json.dumps(vars(Ending(OK, "")))))
    monkeypatch.setattr(ray, "_trainer", lambda *arguments, **named: RanksElsewhere())
    with pytest.raises(ConfigError, match="run_dir is .* nothing for this host; name a folder on storage that all hosts share"):
        ray._fit(None, Recipe(Config(run_dir=str(tmp_path / "run"))), [1], ray._StopFile(tmp_path / "STOP"), debug=False)


def test_ranks_of_ray_that_do_not_heed_a_request_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for a host, say, have nobody to hear it."""
    never = threading.Event()
    monkeypatch.setattr(ray, "_trainer", lambda *arguments, **named: SimpleNamespace(fit=never.wait))
    monkeypatch.setattr(ray, "_GRACE_S", 0.1)
    config = Config(run_dir=str(tmp_path), guard=Guard(stop_within_s=0.2))
    with ray._StopFile(tmp_path / STOP_FILE) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        ending = ray._fit(None, Recipe(config), [1], stop, debug=False)
    never.set()
    assert ending.code == STOPPED
    assert "did not leave within 0.2 s (guard.stop_within_s)" in ending.message


FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
  *ray.scripts.scripts*)
    echo "$$" >>"$STARTS"
    if [ "$(wc -l <"$STARTS")" -lt "$GOOD" ]; then echo "$REASON"; exit 1; fi
    echo "Ray runtime started"; exec sleep 600 ;;
  *launchers.ray_cluster*) exit 0 ;;
  *) exec "$REAL" "$@" ;;
esac
"""
LATE = "The current node timed out during startup."


@pytest.mark.parametrize(("good", "reason", "starts"), [(1, LATE, 1), (2, LATE, 2), (9, LATE, 3), (2, "port in use", 1)])
def test_a_host_that_rays_30_s_were_too_short_for_is_started_again(tmp_path: Path, good: int, reason: str, starts: int) -> None:
    fake = tmp_path / "env" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    told = {"CLAE_ENV": str(tmp_path / "env"), "STARTS": str(tmp_path / "starts"), "GOOD": str(good), "REASON": reason}
    environment = processes.environment(**told, REAL=sys.executable)
    with tempfile.TemporaryDirectory(prefix="clae-r-", dir="/tmp") as folder:  # Ray's sockets need a short path
        words = ["--temp-dir", folder, "--token-file", f"{folder}/token"]

        def call(command: str, *more: str) -> Completed:
            return processes.run("launch/ray-cluster.sh", command, *more, *words, env=environment, timeout=60)

        done = call("head", "--address", "127.0.0.1")
        try:
            assert len((tmp_path / "starts").read_text().split()) == starts
            if good <= starts:
                assert done.returncode == 0, done.stderr
                assert "the cluster is at 127.0.0.1:6379" in done.stdout
            else:
                assert done.returncode == 2
                assert f"{reason}\n" in done.stderr
                assert "Ray did not start as head" in done.stderr
        finally:
            assert call("stop").returncode == 0
        left = [pid for pid in (tmp_path / "starts").read_text().split() if Path(f"/proc/{pid}").exists()]
        assert left == []


def ray_cluster(home: Path, *words: str) -> Completed:
    """launch/ray-cluster.sh with this Python, and a home folder of its own."""
    (home / "env" / "bin").mkdir(parents=True, exist_ok=True)
    if not (python := home / "env" / "bin" / "python").exists():
        python.symlink_to(sys.executable)
    environment = processes.environment(CLAE_ENV=str(home / "env"), HOME=str(home))
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    return processes.run("launch/ray-cluster.sh", *words, env=environment, timeout=60)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A host's part of a cluster, as `head` leaves it, and a token."""
    with tempfile.TemporaryDirectory(prefix="clae-r-", dir="/tmp") as folder:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
        (tmp_path / ".ray" / "auth_token").chmod(0o600)
        (Path(folder) / "address").write_text("192.0.2.1:6379\n")
        yield Path(folder)


def others_mode(state: Path) -> Path:
    state.chmod(0o777)
    return state


def link(state: Path) -> Path:
    (state / "real").mkdir(mode=0o700)
    (state / "real" / "address").write_text("192.0.2.1:6379\n")
    (state / "link").symlink_to(state / "real")
    return state / "link"


def another_users(state: Path) -> Path:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(state, 65534, 65534)
    return state


@pytest.mark.parametrize("put", [others_mode, link, another_users])
def test_nobody_else_can_put_an_address_or_a_process_there(tmp_path: Path, state: Path, put: Callable[[Path], Path]) -> None:
    """The token would go to that address, and the process would be killed."""
    folder = put(state)
    with started("sleep", 60) as victim:
        began = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (folder / "pid").write_text(f"{victim.pid} {began}\n")
        for words in (["status"], ["submit", "configs/quickstart.yaml"], ["stop"], ["head", "--address", "127.0.0.1"]):
            done = ray_cluster(tmp_path, *words, "--temp-dir", str(folder))
            assert done.returncode == 2
            assert "is not a folder of yours" in done.stderr or "can be used by others (mode 777)" in done.stderr
        assert victim.poll() is None


@pytest.mark.parametrize("noted", ["{pid} 1", "{pid}", "-1 1", "x"])
def test_a_process_that_has_the_number_of_one_that_ended_is_left_alone(tmp_path: Path, state: Path, noted: str) -> None:
    with started("sleep", 60) as other:
        (state / "pid").write_text(noted.format(pid=other.pid) + "\n")
        done = ray_cluster(tmp_path, "stop", "--temp-dir", str(state))
        assert (done.returncode, other.poll()) == (0, None), done.stderr
        assert not (state / "pid").exists()


def test_a_token_that_ray_left_readable_is_made_private_and_others_are_refused(tmp_path: Path, state: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.chmod(0o644)
    (state / "address").unlink()
    done = ray_cluster(tmp_path, "status", "--temp-dir", str(state))
    assert token.stat().st_mode & 0o777 == 0o600
    assert "could be read by others (mode 644); it is yours alone now" in done.stderr
    token.chmod(0o664)
    assert "can be read by others (mode 664)" in ray_cluster(tmp_path, "status", "--temp-dir", str(state)).stderr


def test_the_head_says_which_ports_it_opens(tmp_path: Path) -> None:
    said = ray_cluster(tmp_path, "head", "--address", "127.0.0.1", "--dry-run").stdout
    assert "--ray-client-server-port=10001" in said
    assert (
        "ports: cluster 6379, node 6380, objects 6381, Ray's client 10001, Ray's workers 10002-19999; all need the token"
        in said
    )


def test_the_claim_of_a_dead_controller_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is asked of Ray, not of the constant: another Ray may take it from elsewhere."""

    class Coordinator:
        def __init__(self) -> None:
            self.request_resources = SimpleNamespace(remote=lambda **asked: self.asked.append(asked))
            self.asked: list[dict[str, Any]] = []

    coordinator = Coordinator()
    monkeypatch.setattr(coordinator_client, "AUTOSCALING_REQUESTS_EXPIRE_TIME_S", 180)  # as Ray has it, also afterwards
    monkeypatch.setattr(coordinator_client, "get_or_create_autoscaling_coordinator", lambda: coordinator)
    monkeypatch.setattr(coordinator_client.ray, "get", lambda *_, **__: None)
    policy = WorkingSizes(ScalingConfig(num_workers=(1, 2)), [1, 2], tmp_path / "STOP", 1.0)
    policy.after_controller_start(SimpleNamespace(run_id="run"))
    assert [asked["expire_after_s"] for asked in coordinator.asked] == [45]
    assert coordinator_client.AUTOSCALING_REQUESTS_INTERVAL_S * 2 < 45  # it is renewed in time, also if once it is not
