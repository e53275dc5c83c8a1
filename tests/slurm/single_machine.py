"""A SLURM of two nodes on this one machine: munge, slurmctld and two slurmd, from Debian's packages.

    munged -- slurmctld -- slurmd n1 (port a)      all on the loopback address, all state in one temporary folder,
                       \\-- slurmd n2 (port b)      nothing in /etc, so that a SLURM that is there is not touched

`install()` fetches the packages where it may; `SingleMachine` starts and stops the daemons. What a site waits minutes
for is set to seconds: a job that is queued again waits for its credential to expire (cred_expire, 120 s by default,
5 at least), the scheduler looks every minute, and a silent node is taken for down after SlurmdTimeout, 300 s.
"""

import fcntl
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

TOOLS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged", "mungekey")
START_SECONDS = 120.0
NODE_SECONDS = 10  # without an answer of a node, until SLURM takes it for down


class NoSlurmError(Exception):
    """SLURM cannot be had here; the text is the reason to skip."""


def install() -> None:
    """Make sure that the tools are there, with apt-get where this is root on Debian.

    Raises:
        NoSlurmError: some are missing and cannot be installed.
    """
    with open(Path(tempfile.gettempdir()) / "v2pe_slurm_install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side
        _install()


def _install() -> None:
    missing = [tool for tool in TOOLS if _tool(tool) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoSlurmError(
            f"{', '.join(missing)} not found, and only root on Debian can install slurm-wlm, munge"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        command = ["apt-get", "-q", *arguments]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        if done.returncode:
            raise NoSlurmError(f"{' '.join(command)} failed: {(done.stdout + done.stderr).strip()[-300:]}")


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class SingleMachine:
    """Two nodes n1 and n2 in a partition `cpu`, while it is entered.

    Attributes:
        folder: state and logs of the daemons.
        environment: what a process needs to talk to this SLURM.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="v2pe_slurm_"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SingleMachine":
        try:
            self._write_configuration()
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in ("n1", "n2"):
                self.start_node(node)
            self.wait_for_nodes("idle", "idle")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.ask("scancel", "--partition=cpu")
        end = time.monotonic() + 40
        while self.ask("squeue", "-h").strip() and time.monotonic() < end:
            time.sleep(0.3)
        self._stop()

    def ask(self, *command: str) -> str:
        """Standard output of a command of SLURM's."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"----- {log.name}\n{log.read_text(errors='replace')[-2000:]}"
            for log in self.folder.glob("*.log")
        )

    def _write_configuration(self) -> None:
        user, host = getpass.getuser(), socket.gethostname().split(".")[0]
        controller, first, second = _free_ports(3)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for name, port in (("n1", first), ("n2", second))
        )
        # Nothing is put into control groups; the plugin for their first version starts where none are mounted, too.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "slurm.conf").write_text(f"""ClusterName=single
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
# The port that ranks meet at follows from the number of the job, and another of these may run beside.
FirstJobId={1 + os.getpid() % 100 * 100}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self.folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1
SlurmdTimeout={NODE_SECONDS}
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool.%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
MessageTimeout=60
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=01:00:00 OverSubscribe=NO State=UP
""")

    def _start_munge(self) -> None:
        subprocess.run([str(_tool("mungekey")), "-c", "-k", str(self.folder / "munge.key")], check=True)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        self._start(
            "munged", "-F", "--force", *(f"--{key}={self.folder / name}" for key, name in files.items())
        )
        end = time.monotonic() + START_SECONDS
        while not (self.folder / "munge.socket").exists():
            self._check(end, "munged made no socket")

    def _start(self, name: str, *arguments: str, key: str = "") -> None:
        key = key or name
        with open(self.folder / f"start_{key}.log", "ab") as log:
            self._daemons[key] = subprocess.Popen(
                [str(_tool(name)), *arguments], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start("slurmd", "-D", "-N", node, key=node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to a node's slurmd; what it started continues, as SLURM leaves steps to their own daemons."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def wait_for_nodes(self, first: str, second: str) -> None:
        """Wait until the states of both nodes are these, as sinfo writes them; a silent node has a star after it."""
        end = time.monotonic() + START_SECONDS
        while (found := self.ask("sinfo", "-h", "-N", "-o", "%T").split()) != [first, second]:
            self._check(end, f"the nodes are {found}, not {first}, {second}")

    def _check(self, end: float, problem: str) -> None:
        dead = [daemon.args for daemon in self._daemons.values() if daemon.poll() is not None]
        if dead or time.monotonic() > end:
            raise RuntimeError(f"{problem}; ended: {dead}\n{self.logs()}")
        time.sleep(0.1)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
