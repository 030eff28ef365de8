"""A Slurm of two nodes on this machine, from Debian's packages: real daemons on the loopback, all files in one folder.

    python tests/slurm/cluster.py      starts one, prints how to use it, and stops it at Ctrl-C

Needs root (munge and slurmd start jobs as the user who sent them) and Slurm:

    apt-get install --no-install-recommends munge slurmctld slurmd slurm-client
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
MARK = "# nodes of a Slurm for tests, process"  # followed by the number of the process, in lines added to HOSTS
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
LONG = 600  # seconds after which waiting for a job is given up; a loaded machine needs much less
CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_requirement() -> str | None:
    "Return why no cluster can be started here; None if one can."
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
    absent = [name for name in programs if not shutil.which(name, path=SYSTEM_PATH)]
    if absent:
        return (
            f"Slurm is not installed ({', '.join(absent)}); "
            "Debian and Ubuntu: apt-get install --no-install-recommends munge slurmctld slurmd slurm-client"
        )
    return None if os.geteuid() == 0 else "a Slurm for tests can only be started by root"


def free_ports(count: int) -> list[int]:
    "Return numbers of ports that no process uses."
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def exclusive_lock(path: Path):
    "Keep the other clusters from changing a file."
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Cluster:
    """A context in which a cluster runs; its daemons are children of this process.

    Slurm's commands use it when they run with `environment`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.processes: list[subprocess.Popen] = []
        self.configuration = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.configuration)}
        for name, value in os.environ.items():
            if not name.startswith(("SLURM_", "SBATCH_")):
                self.environment[name] = value

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "run", "log", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(folder=self.folder, host=host, ports=free_ports(3))
        self.configuration.write_text(text)
        try:
            self.add_nodes_to_hosts()
            self.start_munge()
            self.start_daemon("slurmctld", "-D", "-f", self.configuration)
            for node in NODES:
                self.start_daemon("slurmd", "-D", "-f", self.configuration, "-N", node)
            self.wait_until(lambda: self.count_idle_nodes() == len(NODES), "the nodes are not idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def count_idle_nodes(self) -> int:
        "Return the number of nodes that wait for jobs; 0 while the controller does not answer."
        return int(self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() or 0)

    def __exit__(self, *error) -> None:
        if len(self.processes) > 1:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
        with exclusive_lock(HOSTS):
            HOSTS.write_text("".join(self.other_hosts_lines()))

    def other_hosts_lines(self) -> list[str]:
        "Return the lines of /etc/hosts that belong neither to this cluster nor to one whose process has ended."
        kept = []
        for line in HOSTS.read_text().splitlines(keepends=True):
            owner = line.partition(MARK)[2].strip()
            if not owner or (owner != str(os.getpid()) and Path(f"/proc/{owner}").exists()):
                kept.append(line)
        return kept

    def add_nodes_to_hosts(self) -> None:
        "Make the names of the nodes and of this machine mean this machine; several processes use them as addresses."
        with exclusive_lock(HOSTS):
            text = "".join(self.other_hosts_lines()).rstrip("\n")
            names = " ".join([*NODES, socket.gethostname()])
            HOSTS.write_text(f"{text}\n127.0.0.1 {names}  {MARK} {os.getpid()}\n")

    def start_munge(self) -> None:
        "Start the daemon that authenticates Slurm's messages, with a key of its own."
        folder = self.folder / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(64))
        (folder / "key").chmod(0o400)
        self.start_daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/key",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            f"--log-file={folder}/log",
            f"--seed-file={folder}/seed",
        )
        self.wait_until(lambda: (folder / "socket").exists(), "munged does not answer")

    def start_daemon(self, name: str, *arguments) -> None:
        "Start a program that belongs to the cluster; its output goes to log/daemons.log."
        with open(self.folder / "log" / "daemons.log", "a") as log:
            process = subprocess.Popen(
                [shutil.which(name, path=SYSTEM_PATH), *map(str, arguments)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)

    def wait_until(self, condition, problem: str, seconds: float = LONG) -> None:
        "Wait until a condition holds. Raises TimeoutError with the problem and the ends of the logs."
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{problem} after {seconds:g} s\n{self.read_log_ends()}")
            time.sleep(0.1)

    def read_log_ends(self) -> str:
        "Return the last 15 lines of each log."
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append("\n".join([f"{path.name}:", *lines]))
        return "\n".join(parts)

    def run(self, *words, check: bool = True, **options) -> str:
        "Run a command of Slurm and return what it prints. Raises RuntimeError when it fails, unless `check` is off."
        done = subprocess.run(
            list(map(str, words)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONG,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def show_jobs(self, number: str) -> list[dict[str, str]]:
        "Return what Slurm knows about a job, or about every task of an array."
        lines = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def wait_for_jobs(self, number: str) -> list[dict[str, str]]:
        "Wait until a job, or every task of an array, has ended; return what Slurm knows about them."
        final_states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        def have_ended() -> bool:
            return all(job["JobState"] in final_states for job in self.show_jobs(number))

        self.wait_until(have_ended, f"job {number} has not ended")
        return self.show_jobs(number)


if __name__ == "__main__":
    reason = missing_requirement()
    if reason:
        sys.exit(f"cluster: {reason}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        print("two nodes are running; in another terminal:")
        print(f"    export SLURM_CONF={cluster.configuration}\nCtrl-C stops them", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()
