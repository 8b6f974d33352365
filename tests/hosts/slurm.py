"""A real Slurm on hosts of network namespaces: controller and munge on the last host, a node on each of the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests import processes
from tests.hosts.cluster import Hosts

CONFIGURATION = """\
ClusterName=clae
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
DEADLINE_S = 60.0


def why_not() -> str:
    """Why this machine cannot run Slurm; "" when it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "mungekey") if shutil.which(name) is None]
    return f"{', '.join(missing)} missing; Debian: apt-get install slurm-wlm munge" if missing else ""


class Slurm:
    """Slurm on `hosts`, as a context manager; its processes end with the hosts'."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.nodes = range(hosts.num_hosts - 1)

    def __enter__(self) -> Slurm:
        self.folder = Path(tempfile.mkdtemp(prefix="clae-slurm-", dir="/tmp"))  # unix sockets: a short path
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        controller = self.hosts.num_hosts - 1
        nodes = "\n".join(
            f"NodeName={self.hosts.name(node)} NodeAddr={self.hosts.address(node)} CPUs=1 State=UNKNOWN" for node in self.nodes
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=self.hosts.name(controller), address=self.hosts.address(controller), folder=self.folder, nodes=nodes
            )
        )
        key = self.folder / "munge.key"
        processes.run("mungekey", "--create", f"--keyfile={key}", check=True)
        munged = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={self.folder}/munge.socket"]
        munged += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "seed", "log")]
        self._start(controller, munged)
        self._wait("munge.socket", lambda: (self.folder / "munge.socket").exists())
        self._start(controller, ["slurmctld", "-D"])
        for node in self.nodes:
            self._start(node, ["slurmd", "-D", "-N", self.hosts.name(node)])
        self._wait(
            "idle nodes", lambda: self("sinfo", "--noheader", "--format=%D %T").split() == [str(len(self.nodes)), "idle"]
        )
        return self

    def __exit__(self, *exception: object) -> None:
        for host in range(self.hosts.num_hosts):
            self.hosts.kill(host)
        shutil.rmtree(self.folder)

    def _start(self, host: int, command: Sequence[str]) -> None:
        self.hosts.popen(host, command, self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "MUNGE_SOCKET": str(self.folder / "munge.socket")}

    def __call__(self, *command: str, **environment: str) -> str:
        """What a command of Slurm's says, run on the first node."""
        done = self.hosts.run(0, command, {**self.environment, **environment})
        return done.stdout if done.returncode == 0 else f"{command[0]} failed: {done.stdout}"

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, … and how often it was started again: "COMPLETED 1"."""
        words = dict(word.split("=", 1) for word in self("scontrol", "--oneliner", "show", "job", job).split() if "=" in word)
        return f"{words.get('JobState', 'GONE')} {words.get('Restarts', '0')}"

    def _wait(self, what: str, reached: object) -> None:
        assert callable(reached)
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            assert time.monotonic() < deadline, f"no {what} after {DEADLINE_S:g} s:\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


def submit(slurm: Slurm, script: Path, options: Sequence[str], arguments: Sequence[str], **environment: str) -> str:
    """The number of the job."""
    said = slurm("sbatch", "--parsable", *options, os.fspath(script), *arguments, **environment)
    assert said.strip().isdigit(), said
    return said.strip()
