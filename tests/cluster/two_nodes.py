"""A real Slurm of two nodes on one machine: Debian's packages, unpacked and not installed, each node in a network
namespace with an address, a host name and a core of its own.

Everything runs inside namespaces of a parent that is their first process: when it ends, however it ends, the kernel
ends all processes and takes networks and mounts away. What stays is the cache of packages and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "iproute2")
CONTROL, NODES = "10.77.0.1", {"n1": "10.77.0.11", "n2": "10.77.0.12"}
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")
DEAD_AFTER = 10
"""Seconds of silence after which Slurm gives a node up."""
CONFIGURATION = """\
ClusterName=two
SlurmctldHost=control({control})
SlurmctldPort=17000
SlurmdPort=17001
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout={dead_after}
SchedulerParameters=sched_interval=3,bf_interval=3,batch_sched_delay=0
KillWait=15
SlurmdParameters=config_overrides
StateSaveLocation={work}/state
SlurmctldPidFile={work}/slurmctld.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdPidFile={work}/%n/slurmd.pid
SlurmdLogFile={work}/%n/slurmd.log
SlurmdSpoolDir={work}/%n/spool
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class CannotRun(Exception):
    """This machine does not allow it, and why."""


def require_namespaces() -> None:
    """Finds out whether namespaces can be made.

    Raises:
        CannotRun: they cannot.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        raise CannotRun(f"network namespaces need root on Linux, and this is user {os.geteuid()} on {sys.platform}")
    if len(os.sched_getaffinity(0)) < len(NODES):
        raise CannotRun(f"each node needs a core, and there are {len(os.sched_getaffinity(0))}")
    for tool in ("unshare", "nsenter", "setpriv", "taskset", "apt-get", "dpkg", "mount", "bash"):
        if not shutil.which(tool):
            raise CannotRun(f"there is no {tool}")
    done = run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"])
    if done.returncode:
        raise CannotRun(f"unshare {' '.join(NAMESPACES)} is refused: {done.stdout.strip()}")


def run(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def unpacked() -> Path:
    """A folder with Slurm in it, as the packages lay it out; kept for the next time.

    Raises:
        CannotRun: apt does not give the packages.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facefast" / "slurm"
    wanted = ["apt-get", "install", "--simulate", "--no-install-recommends", *PACKAGES]
    found = run(wanted)
    if found.returncode:
        run(["apt-get", "update"])
        found = run(wanted)
    if found.returncode:
        raise CannotRun(f"apt does not know Debian's Slurm: {found.stdout.strip().splitlines()[-1]}")
    missing = sorted(re.findall(r"^Inst (\S+) \((\S+)", found.stdout, re.M))
    place = cache / hashlib.sha256(repr(missing).encode()).hexdigest()[:12]
    if place.exists():
        return place
    aside = place.with_name(f"{place.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        names = [name for name, _ in missing]
        fetched = run(["apt-get", "download", *names], cwd=aside)
        if fetched.returncode:  # the lists are older than the mirror
            run(["apt-get", "update"])
            fetched = run(["apt-get", "download", *names], cwd=aside)
        if fetched.returncode:
            raise CannotRun(f"the packages cannot be fetched: {fetched.stdout.strip().splitlines()[-1]}")
        for package in aside.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, aside], check=True)
            package.unlink()
        aside.rename(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return place


def inside_namespaces(command: Sequence[str]) -> int:
    """Runs a command in namespaces of its own; returns its exit code once every process in them is gone."""
    # bash, as the first process, gathers the dead whom nobody else waits for: Slurm takes a zombie for a living task.
    shell = ["bash", "-c", '"$@"; exit $?', "first", *command]
    ends_with_us = ["setpriv", "--pdeathsig", "KILL"]
    process = subprocess.Popen(
        [*ends_with_us, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", *shell]
    )
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()


def environment(root: Path, work: Path) -> dict[str, str]:
    """That of everybody who talks to the cluster."""
    libraries = [root / "usr/lib" / f"{os.uname().machine}-linux-gnu"]
    libraries.append(libraries[0] / "slurm-wlm")
    return os.environ | {
        "PATH": os.pathsep.join([os.environ["PATH"], *(f"{root}/{part}" for part in ("usr/bin", "usr/sbin", "sbin"))]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "SLURM_CONF": str(work / "slurm.conf"),
    }


@dataclass
class Cluster:
    """Two nodes and their controller, inside namespaces."""

    work: Path
    environment: dict[str, str]

    def tool(self, name: str) -> str:
        """A daemon's path; Debian calls them slurmd-wlm and the like."""
        found = (shutil.which(name + suffix, path=self.environment["PATH"]) for suffix in ("-wlm", ""))
        return next(filter(None, found))

    def call(self, *command: str | Path) -> str:
        """What a command says that must succeed."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def start(self, *command: str | Path, log: str) -> subprocess.Popen[bytes]:
        """A process that goes on; what it says is in the file `log`."""
        with open(self.work / log, "ab") as file:
            return subprocess.Popen(
                list(map(str, command)), env=self.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL
            )

    def start_node(self, name: str) -> None:
        """slurmd in the node's network, under the node's name, on one core, as everything that it starts."""
        core = sorted(os.sched_getaffinity(0))[list(NODES).index(name)]
        boot = (
            f"hostname {name} && exec taskset -c {core} {self.tool('slurmd')} -D -N {name} -d {self.tool('slurmstepd')}"
        )
        self.start("nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "sh", "-c", boot, log=f"{name}.out")

    def kill_node(self, name: str) -> None:
        """Ends every process of a node at once, as a power cut does."""
        for process in self.call("ip", "netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Returns when it is so.

        Raises:
            TimeoutError: it does not become so.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{seconds:g} s have gone without this: {what}")
            time.sleep(0.2)

    def state(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def idle(self) -> bool:
        """Whether all nodes are there and have nothing to do."""
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=self.environment, capture_output=True, text=True)
        return done.stdout.split() == ["idle"] * len(NODES)


@contextlib.contextmanager
def cluster(root: Path, work: Path) -> Iterator[Cluster]:
    """Starts it; the caller is in namespaces of its own, which end it."""
    made = Cluster(work, environment(root, work))
    private(made)
    network(made)
    for folder in ("state", *(f"{name}/spool" for name in NODES)):
        (work / folder).mkdir(parents=True)
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address} CPUs=1 Sockets=1 CoresPerSocket=1 ThreadsPerCore=1"
        for name, address in NODES.items()
    )
    (work / "slurm.conf").write_text(
        CONFIGURATION.format(
            control=CONTROL,
            plugins=made.environment["LD_LIBRARY_PATH"].split(os.pathsep)[1],
            work=work,
            dead_after=DEAD_AFTER,
            nodes=nodes,
        )
    )
    key = work / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    made.start(
        "munged", "--foreground", "--force", f"--key-file={key}", "--pid-file=/run/munge/munged.pid",
        "--socket=/run/munge/munge.socket.2", f"--seed-file={work}/munge.seed", log="munged.out",
    )  # fmt: skip
    made.wait_for("munged", Path("/run/munge/munge.socket.2").exists, 20)
    made.start(made.tool("slurmctld"), "-D", log="slurmctld.out")
    for name in NODES:
        made.start_node(name)
    made.wait_for("two idle nodes", made.idle, 30)
    yield made


def private(made: Cluster) -> None:
    """/run, names of hosts and no name server, for these processes alone."""
    made.call("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/munge").mkdir(mode=0o755)
    hosts = {"localhost": "127.0.0.1", "control": CONTROL, **NODES}
    (made.work / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    (made.work / "resolv.conf").write_text("")
    for name in ("hosts", "resolv.conf"):
        made.call("mount", "--bind", made.work / name, f"/etc/{name}")
    made.call("hostname", "control")


def network(made: Cluster) -> None:
    """A switch to which the controller and each node have a cable."""
    made.call("ip", "link", "set", "lo", "up")
    made.call("ip", "link", "add", "switch", "type", "bridge")
    made.call("ip", "addr", "add", f"{CONTROL}/24", "dev", "switch")
    made.call("ip", "link", "set", "switch", "up")
    for name, address in NODES.items():
        made.call("ip", "netns", "add", name)
        made.call("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        made.call("ip", "link", "set", f"to-{name}", "master", "switch", "up")
        made.call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            made.call("ip", "-n", name, "link", "set", device, "up")
