"""A real Slurm cluster of two nodes on this machine, without touching its system.

Its daemons are started in a folder and ended by their process ids.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.ranks import free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# On Debian the daemons are in folders that only root has on its PATH.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
CONFIGURATION = """\
ClusterName=local
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=15
MinJobAge=600
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes={nodes} PriorityTier=2 MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000 "
    "Gres=gpu:2 State=UNKNOWN\n"
)
START_S = 60.0


class SlurmError(Exception):
    """A command of Slurm failed, or the cluster did not start; the message has its logs."""


def what_is_missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"{', '.join(absent)} not found; as root: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return f"user id is {os.geteuid()}, slurmd needs 0; run the tests as root"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm:
    """A running cluster; its commands find it by `environment`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user, in which the commands of Slurm go to this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

    def run(self, *command: str) -> str:
        """Run a command of Slurm; returns what it prints."""
        return _run(command, self.environment)

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job in the output of `scontrol show job`."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and a slurmd for each node in `folder`; at the end stop them."""
    slurm = Slurm(folder=folder)
    _configure(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_munge(folder))
        daemons.append(_daemon(slurm, "slurmctld", "-D", "-c"))
        daemons += [_daemon(slurm, "slurmd", "-D", "-N", name) for name in NODES]
        _wait_until_idle(slurm, daemons)
        yield slurm
    finally:
        _end_jobs(slurm)
        for daemon in reversed(daemons):
            _stop(daemon)


def _configure(folder: Path) -> None:
    # munged insists that all users can reach it, and that no other user can read its key.
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(
        host=host,
        folder=folder,
        port=free_port(),
        nodes=",".join(NODES),
        # The ports of jobs follow from their numbers, which must differ from those of another
        # cluster on this machine.
        first_job=1 + 100 * (os.getpid() % 30_000),
    )
    text += "".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
    (folder / "slurm.conf").write_text(text)
    # Any device file passes for a GPU.
    devices = "".join(
        f"NodeName={name} Name=gpu File={device}\n"
        for name in NODES
        for device in ("/dev/null", "/dev/zero")
    )
    (folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}")


def _munge(folder: Path) -> subprocess.Popen[bytes]:
    # --force: munged considers a parent of the test's folder unsafe.
    # --origin: the name of this machine need not resolve.
    files = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    options = [f"--{option}={folder / name}" for option, name in files.items()]
    return _start(folder, "munged", "--foreground", "--force", "--origin=127.0.0.1", *options)


def _daemon(slurm: Slurm, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    return _start(slurm.folder, program, *arguments, environment=slurm.environment)


def _start(
    folder: Path, program: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    path = shutil.which(program, path=SEARCH)
    assert path is not None, program
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            [path, *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )


def _wait_until_idle(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + START_S
    state = ""
    while time.monotonic() < until and all(daemon.poll() is None for daemon in daemons):
        try:
            state = slurm.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t")
        except SlurmError as error:
            state = str(error)
        if sorted(state.split("\n")) == [f"{name} idle" for name in NODES]:
            return
        time.sleep(0.2)
    raise SlurmError(f"the nodes are not idle: {state}\n{_logs(slurm.folder)}")


def _logs(folder: Path) -> str:
    texts = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log"))]
    return "\n".join(texts)


def _end_jobs(slurm: Slurm) -> None:
    """Cancel all jobs, so that no process of a job outlives the cluster."""
    try:
        slurm.run("scancel", "--user=root")
        until = time.monotonic() + START_S
        while slurm.run("squeue", "--noheader") and time.monotonic() < until:
            time.sleep(0.2)
    except SlurmError:
        return  # it has never started, so it has no jobs


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _run(command: tuple[str, ...], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
