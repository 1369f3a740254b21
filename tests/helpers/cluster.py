"""A real, private Slurm on this machine: munge, slurmctld and one slurmd per simulated node.

Needs root and the kernel's cgroup v1 freezer: with `proctrack/cgroup`, a signal reaches the same processes as
on a cluster (the batch shell, or the processes that srun started, never their children). All files are in one
folder, and all daemons listen on loopback. Each node has its own host name, which its jobs can resolve.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "setpriv", "unshare")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def why_not() -> str | None:
    """Return the reason why Slurm can't run here, or None."""
    if missing := [name for name in PROGRAMS if _which(name) is None]:
        return f"Slurm is not installed ({', '.join(missing)}): see tests/packages.txt"
    freezer = "mount -t cgroup -o freezer none /tmp"  # in its own namespace, so it needs no unmount
    probe = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", freezer]
    if subprocess.run(probe, capture_output=True).returncode:
        return "a realistic Slurm needs root and the cgroup v1 freezer"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """start() ... stop(). Nodes n1, n2, ... with 64 CPUs and `gpus` GPUs each, all simulated.

    Partitions `main`, `graceful` and `urgent`. Jobs in `urgent` preempt those in the others, which are
    requeued (in `graceful` after 100 s).
    """

    def __init__(self, root: Path, *, nodes: int = 2, gpus: int = 2, kill_wait_s: int = 10) -> None:
        self.root, self.gpus, self.kill_wait_s = root.resolve(), gpus, kill_wait_s
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        foreign = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE")  # the tests themselves may run in a job
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.env["SLURM_CONF"] = str(self.root / "slurm.conf")
        # Cgroups are named by job number, not by cluster: avoid the numbers of another cluster.
        self.first_job = random.randrange(1, 60000) * 1000
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for folder in ("state", "run", "freezer", *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        self._configure()
        run = self.root / "run"
        files = [f"--{n}={run}/munge.{n[:4]}" for n in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", ["munged", "-F", "--force", f"--key-file={self.root}/munge.key", *files])
        self._until(lambda: (run / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", ["slurmctld", "-D", "-i", "-c"])
        self._until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "slurmctld")
        for node in self.nodes:
            setup = (
                f"mount --bind {self.root}/hosts /etc/hosts && hostname {node} &&"
                f' mount -t cgroup -o freezer none {self.root}/freezer && exec "$@"'
            )
            own = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", setup, "sh"]
            self._daemon(f"slurmd.{node}", [*own, str(_which("slurmd")), "-D", "-N", node])
        self._until(lambda: self._states() == [f"{node} idle" for node in self.nodes], "idle nodes")

    def stop(self) -> None:
        self.run("scancel", "--me", "--full", "--signal=KILL", check=False)
        self._kill_jobs()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(2)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_jobs()
        self._remove_cgroups()

    def run(self, *line: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(line, **{"env": self.env, "text": True, "capture_output": True, **more})
        assert not check or done.returncode == 0, f"{line[0]}: {done.stderr}"
        return done

    def sbatch(self, *arguments: str, **more: Any) -> int:
        return int(self.run("sbatch", "--parsable", *arguments, **more).stdout)

    def show(self, job: int) -> dict[str, str]:
        """scontrol's fields of a job; values are cut at the first space."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: int, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until the job is in one of these states (default: has ended)."""
        wanted = states or ENDED
        self._until(lambda: self.show(job)["JobState"] in wanted, f"job {job} {wanted}", timeout_s)
        return self.show(job)

    def _until(self, ready: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
        until = time.monotonic() + timeout_s
        while not ready():
            dead = [str(d.args) for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > until:
                logs = "\n".join(f"{f.name}: {f.read_text()[-1500:]}" for f in self.root.glob("*.log"))
                raise TimeoutError(f"timed out: {what}; exited: {dead}\n{logs}\n{self._states()}")
            time.sleep(0.05)

    def _states(self) -> list[str]:
        found = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout
        return sorted(line.strip() for line in found.splitlines())

    def _daemon(self, name: str, line: list[str]) -> None:
        """Start a daemon that exits with this process."""
        line = ["setpriv", "--pdeathsig", "TERM", str(_which(line[0])), *line[1:]]
        with open(self.root / f"{name}.log", "ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    line, env=self.env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip

    def _configure(self) -> None:
        root, host = self.root, socket.gethostname()
        key = os.open(root / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(key, os.urandom(128))
        os.close(key)
        control, *ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=500000"
            f" Gres=gpu:{self.gpus}"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        (root / "slurm.conf").write_text(
            f"""\
ClusterName=test
FirstJobId={self.first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={self.kill_wait_s}
MinJobAge=600
TreeWidth=64
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=graceful Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=100
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
        )
        cgroup = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={root}\n"
        (root / "cgroup.conf").write_text(cgroup)
        for number in range(self.gpus):  # character devices whose names end in their numbers
            (root / f"gpu{number}").symlink_to("/dev/null")
        devices = f"{root}/gpu[0-{self.gpus - 1}]" if self.gpus > 1 else f"{root}/gpu0"
        (root / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={devices}\n")
        names = "".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *self.nodes))
        (root / "hosts").write_text(names)

    def _kill_jobs(self) -> None:
        """Kill what slurmd started: the processes whose environment names our slurm.conf and a node."""
        ours = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            node = any(entry.startswith(b"SLURMD_NODENAME=") for entry in environment)
            if ours in environment and (node or command.startswith(b"slurmstepd")):
                try:
                    os.kill(int(process.name), signal.SIGKILL)
                except ProcessLookupError:
                    pass

    def _remove_cgroups(self) -> None:
        freezer = self.root / "freezer"
        subprocess.run(["mount", "-t", "cgroup", "-o", "freezer", "none", freezer], capture_output=True)
        for job in freezer.glob("slurm_n*/uid_*/job_*"):
            if 0 <= int(job.name[4:]) - self.first_job < 1000:
                for folder, _, _ in os.walk(job, topdown=False):
                    try:
                        os.rmdir(folder)
                    except OSError:  # a killed process has not exited yet: leave it
                        pass
        subprocess.run(["umount", "-l", freezer], capture_output=True)


def _free_ports(count: int) -> list[int]:
    """Free ports below the kernel's ephemeral range, from which srun takes its own."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10000, 20000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
