"""launch/torchrun.sh on three hosts: what it says it would run, what it runs, and what is left after faults."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path

import pytest

from tests import processes
from tests.hosts.cluster import Hosts, clean_environment
from tests.hosts.small import assert_steps_once, saved_steps, wait_for
from tests.processes import ROOT, Process, finish
from tests.small_run import STEPS, Undisturbed, assert_same_weights


def torchrun(hosts: Hosts, nodes: str, recipe: Path, overrides: list[str], *options: str) -> list[str]:
    head = f"{hosts.address(0)}:29507"
    return ["launch/torchrun.sh", "--nodes", nodes, "--ranks-per-node", "1", "--head", head, *options, str(recipe), *overrides]


def test_dry_run_prints_what_the_real_thing_runs(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "name=two words", "attack.epsilon=8/255"]
    for host, is_host in ((0, "1"), (2, "0")):
        said = hosts.run(host, torchrun(hosts, "2:3", recipe, overrides, "--id", "mine", "--dry-run")).stdout
        (line,) = [line for line in said.splitlines() if line.startswith("$")]
        words = shlex.split(line[1:])
        assert words[0] == "env"
        assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0", "CLAE_NODES=2:3"} <= set(words)
        assert {"--nnodes=2:3", "--nproc-per-node=1", "--rdzv-id=mine", "--max-restarts=4"} <= set(words)
        assert {f"--local-addr={hosts.address(host)}", f"--rdzv-endpoint={hosts.address(0)}:29507"} <= set(words)
        assert f"is_host={is_host}," in next(word for word in words if word.startswith("--rdzv-conf="))
        assert words[words.index("clae_dist") :] == ["clae_dist", "train", str(recipe), "--launcher", "torchrun", *overrides]
        assert f"interface: eth0, address {hosts.address(host)}" in said
        assert "nothing was run" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2", "configs/quickstart.yaml"], "--head is missing"),
        (["--head", "127.0.0.1", "configs/quickstart.yaml"], "--nodes is missing"),
        (
            ["--nodes", "3:2", "--head", "127.0.0.1", "configs/quickstart.yaml"],
            "--nodes is 3:2; the smaller number comes first",
        ),
        (["--nodes", "two", "--head", "127.0.0.1", "configs/quickstart.yaml"], "--nodes is 'two'; use an integer from 1"),
        (["--nodes", "2", "--head", "127.0.0.1:x", "configs/quickstart.yaml"], "the port of --head is 'x'"),
        (["--nodes", "2", "--head", "127.0.0.1", "nowhere.yaml"], "nowhere.yaml is no file here"),
        (["--nodes", "2", "--head", "127.0.0.1"], "no recipe was named"),
        (["--nodes", "2", "--head", "nowhere.invalid", "configs/quickstart.yaml"], "nowhere.invalid cannot be reached"),
        (["--nodes", "2", "--head", "127.0.0.1", "--node-rank", "2", "configs/quickstart.yaml"], "2 hosts are 0 to 1"),
        (["--nodes", "2", "--ranks", "1"], "--ranks is not an option"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(arguments: list[str], words: str) -> None:
    done = processes.run(ROOT / "launch" / "torchrun.sh", *arguments, env=clean_environment(), timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("torchrun: ")


@pytest.mark.slow
def test_numbers_of_hosts_that_cannot_share_the_batch_are_refused_at_the_start(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    """16 images among 2 or 3: the run would end on the day that a host is lost."""
    overrides = [f"run_dir={tmp_path}/run", "batch.global_size=16"]
    process = hosts.popen(1, torchrun(hosts, "2:3", recipe, overrides))
    code, said = finish(hosts.popen(0, torchrun(hosts, "2:3", recipe, overrides)))
    assert code == finish(process)[0] == 2
    assert "--nodes is 2:3 with 1 rank each, but 3 ranks cannot share batch.global_size 16" in said


@pytest.mark.slow
def test_three_hosts_train_to_the_bits_of_one(hosts: Hosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """Stopped by the scheduler's signal on one host, all save and leave with 75; the same lines go on."""
    overrides = [f"run_dir={tmp_path}/run", "data.workers=1"]

    def start() -> list[Process]:
        return [hosts.popen(host, torchrun(hosts, "3", recipe, overrides)) for host in (2, 1, 0)]

    processes = start()
    wait_for(tmp_path / "run", "step  5/24", processes)
    processes[0].send_signal(signal.SIGUSR1)
    for process in processes:
        code, said = finish(process)
        assert code == 75, said
    assert "stopped after step" in (tmp_path / "run" / "console.log").read_text()
    assert 5 <= saved_steps(tmp_path / "run")[0] < STEPS

    for process in start():
        code, said = finish(process)
        assert code == 0, said
    assert "ranks: 3 on 3 hosts" in (tmp_path / "run" / "console.log").read_text()
    assert_same_weights(tmp_path / "run", undisturbed(3))


@pytest.mark.slow
def test_static_rendezvous_ends_with_a_lost_host_and_goes_on_from_the_checkpoint(
    hosts: Hosts, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Nothing is started again by itself: all hosts end with a reason, and the same lines go on."""
    overrides = [f"run_dir={tmp_path}/run"]

    def start() -> list[Process]:
        lines = {host: torchrun(hosts, "3", recipe, overrides, "--node-rank", str(host)) for host in (2, 1, 0)}
        return [hosts.popen(host, line) for host, line in lines.items()]

    processes = start()
    wait_for(tmp_path / "run", "step  6/24", processes)
    hosts.kill(2)
    assert finish(processes[0])[0] == -signal.SIGKILL
    for process in processes[1:]:
        code, said = finish(process)
        assert code == 4, said
        assert "ranks failed and were not started again" in said

    for process in start():
        code, said = finish(process)
        assert code == 0, said
    assert "resuming after step" in (tmp_path / "run" / "console.log").read_text()
    assert_steps_once(tmp_path / "run")
    assert_same_weights(tmp_path / "run", undisturbed(3))


@pytest.mark.slow
def test_a_lost_host_shrinks_an_elastic_run_and_its_return_grows_it(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path}/run", "train.epochs=12"]
    start = [hosts.popen(host, torchrun(hosts, "2:3", recipe, overrides)) for host in range(3)]
    wait_for(tmp_path / "run", "ranks: 3 on 3 hosts", start)
    wait_for(tmp_path / "run", "step  5/48", start)
    hosts.kill(2)
    wait_for(tmp_path / "run", "ranks: 2 on 2 hosts", start[:2])
    start[2] = hosts.popen(2, torchrun(hosts, "2:3", recipe, overrides))
    for process in start:
        code, said = finish(process)
        assert code == 0, said
    assert_steps_once(tmp_path / "run", 48)


@pytest.mark.slow
def test_a_lost_link_is_noticed_and_the_run_goes_on_without_the_host(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    """No process has ended and no connection was closed: the ranks would wait for guard.hang_s, five minutes."""
    overrides = [f"run_dir={tmp_path}/run", "train.epochs=12", "guard.lost_s=6"]
    start = [hosts.popen(host, torchrun(hosts, "2:3", recipe, overrides)) for host in range(3)]
    wait_for(tmp_path / "run", "ranks: 3 on 3 hosts", start)
    wait_for(tmp_path / "run", "step 12/48", start)
    begin = time.monotonic()
    hosts.link_down(2)
    try:
        wait_for(tmp_path / "run", "no answer for 6 s from rank", start[:2])
        wait_for(tmp_path / "run", "ranks: 2 on 2 hosts", start[:2])
        wait_for(tmp_path / "run", "resuming after step", start[:2])
        print(f"{time.monotonic() - begin:.1f} s to a new start")
        for process in start[:2]:
            code, said = finish(process)
            assert code == 0, said
        hosts.kill(2)  # its torchrun would wait for the others
        assert "from the store of the run, which rank 0" in finish(start[2])[1]
    finally:
        hosts.link_up(2)
    assert_steps_once(tmp_path / "run", 48)
