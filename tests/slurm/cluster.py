"""A Slurm of two nodes on this machine, from Debian's packages: real daemons on the loopback, everything else in one folder.

    python tests/slurm/cluster.py      starts one, says how to use it, and stops it at Ctrl-C

Needs root (munge and slurmd start jobs as whoever sent them) and `apt-get install --no-install-recommends munge slurmctld slurmd slurm-client`.
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
HOSTS, MARK = Path("/etc/hosts"), "# nodes of a Slurm for tests, process"
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


def missing() -> str | None:
    "Why no cluster can be started here; None if one can."
    if not (
        absent := [
            name
            for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun")
            if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        ]
    ):
        return None if os.geteuid() == 0 else "a Slurm for tests can only be started by root"
    return f"Slurm is not installed ({', '.join(absent)}); Debian and Ubuntu: apt-get install --no-install-recommends munge slurmctld slurmd slurm-client"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def alone(path: Path):
    "No other cluster changes a file meanwhile."
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Cluster:
    "While entered, a cluster whose daemons are children of this process; `environment` is what makes Slurm's commands use it."

    def __init__(self, folder: Path):
        self.folder, self.processes = Path(folder), []
        self.configuration = self.folder / "slurm.conf"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        } | {"SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> "Cluster":
        for name in ("munge", "state", "run", "log", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.configuration.write_text(
            CONFIGURATION.format(folder=self.folder, host=socket.gethostname().partition(".")[0], ports=free_ports(3))
        )
        try:
            self.name_nodes()
            self.start_munge()
            self.daemon("slurmctld", "-D", "-f", self.configuration)
            for node in NODES:
                self.daemon("slurmd", "-D", "-f", self.configuration, "-N", node)
            self.until(
                lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == str(len(NODES)),
                "the nodes are not idle",
                30,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        if len(self.processes) > 1:
            self.call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.call("scancel", "--user=root", check=False)
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
        with alone(HOSTS):
            HOSTS.write_text("".join(self.others_lines()))

    def others_lines(self) -> list[str]:
        "Lines of /etc/hosts that are not this cluster's, nor of one that was killed."
        lines = HOSTS.read_text().splitlines(keepends=True)
        owners = [line.partition(MARK)[2].strip() for line in lines]
        return [
            line
            for line, owner in zip(lines, owners)
            if not owner or owner != str(os.getpid()) and Path(f"/proc/{owner}").exists()
        ]

    def name_nodes(self) -> None:
        "Let the nodes' names, and this machine's, mean this machine: several processes find each other by them."
        with alone(HOSTS):
            before = "".join(self.others_lines()).rstrip("\n")
            HOSTS.write_text(f"{before}\n127.0.0.1 {' '.join(NODES)} {socket.gethostname()}  {MARK} {os.getpid()}\n")

    def start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(64))
        (folder / "key").chmod(0o400)
        self.daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/key",
            f"--socket={folder}/socket",
            f"--pid-file={folder}/pid",
            f"--log-file={folder}/log",
            f"--seed-file={folder}/seed",
        )
        self.until(lambda: (folder / "socket").exists(), "munged does not answer", 10)

    def daemon(self, name: str, *words) -> None:
        with open(self.folder / "log" / "daemons.log", "a") as log:
            self.processes.append(
                subprocess.Popen(
                    [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"), *map(str, words)],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def until(self, condition, problem: str, seconds: float) -> None:
        "Wait until a condition holds. Raises TimeoutError with the end of the logs."
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
                    for path in sorted((self.folder / "log").iterdir())
                )
                raise TimeoutError(f"{problem} after {seconds:g} s\n{logs}")
            time.sleep(0.1)

    def call(self, *words, check: bool = True, **options) -> str:
        "What a command of Slurm prints."
        done = subprocess.run(
            list(map(str, words)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self, number: str) -> list[dict[str, str]]:
        "What Slurm knows of a job, or of every task of an array."
        return [
            dict(re.findall(r"(\w+)=(\S*)", line))
            for line in self.call("scontrol", "--oneliner", "show", "job", number).splitlines()
        ]

    def ended(self, number: str, seconds: float = 180) -> list[dict[str, str]]:
        "The same, once all of it has ended."
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(
            lambda: all(job["JobState"] in over for job in self.jobs(number)),
            f"job {number} has not ended: {[job['JobState'] for job in self.jobs(number)]}",
            seconds,
        )
        return self.jobs(number)


if __name__ == "__main__":
    if why := missing():
        sys.exit(f"cluster: {why}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        print(
            f"two nodes are up; in another terminal:\n    export SLURM_CONF={cluster.configuration}\nCtrl-C stops them",
            flush=True,
        )
        try:
            signal.pause()
        except KeyboardInterrupt:
            print()
