"""A real Slurm of two nodes on this machine, without touching its system: started by hand in a
folder, ended by pid.
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
# Debian keeps the daemons where only root's PATH looks.
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
    """Slurm did not do what it was started or asked for; the message has what its logs say."""


def what_is_missing() -> str | None:
    """Why no Slurm can be started here; None where one can."""
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
        """What a user's shell has, so that Slurm's commands go to this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH}

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return _run(command, self.environment)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, as `scontrol show job` names it."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and one slurmd for each node below `folder`; at the end stop them."""
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
    # munged wants to be reachable by everybody and its key by nobody.
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
        # The ports of jobs follow from their numbers: those of two clusters on this machine must
        # differ.
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
    # --force: the folder of a test lies below a parent that munged takes for unsafe.
    # --origin: the name of this machine need not resolve.
    places = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "munge.seed",
    }
    words = [f"--{option}={folder / name}" for option, name in places.items()]
    return _start(folder, "munged", "--foreground", "--force", "--origin=127.0.0.1", *words)


def _daemon(slurm: Slurm, program: str, *words: str) -> subprocess.Popen[bytes]:
    return _start(slurm.folder, program, *words, environment=slurm.environment)


def _start(
    folder: Path, program: str, *words: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    path = shutil.which(program, path=SEARCH)
    assert path is not None, program
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            [path, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )


def _wait_until_idle(slurm: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + START_S
    said = ""
    while time.monotonic() < until and all(daemon.poll() is None for daemon in daemons):
        try:
            said = slurm.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t")
        except SlurmError as error:
            said = str(error)
        if sorted(said.split("\n")) == [f"{name} idle" for name in NODES]:
            return
        time.sleep(0.2)
    raise SlurmError(f"the nodes are not idle: {said}\n{_logs(slurm.folder)}")


def _logs(folder: Path) -> str:
    texts = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log"))]
    return "\n".join(texts)


def _end_jobs(slurm: Slurm) -> None:
    """Cancel what is left, so that no process of a job outlives the cluster."""
    try:
        slurm.ask("scancel", "--user=root")
        until = time.monotonic() + START_S
        while slurm.ask("squeue", "--noheader") and time.monotonic() < until:
            time.sleep(0.2)
    except SlurmError:
        return  # it never came up, so it has no jobs


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
