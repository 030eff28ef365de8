"""Run `ebt` and kernels of notebooks in their own processes without importing anything first (`runs/09_fork_server`).

Everything else is as with the installed command, which `test_cli.py` and the files on launching and killing also start.
"""

import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from ebt_nb.runs.fork_server import PRELOADED, ForkServer, end_process, serve
from ebt_nb.runs.preemption import STOP_SIGNALS

TESTS = str(Path(__file__).resolve().parent)
LIMIT = 600  # seconds after which a command is ended


def run_after_setup(words: list[str]) -> int:
    "Execute Python code, the first word, and then run `ebt` with the other words; return the exit code."
    import ebt_nb.cli.main

    setup, *words = words
    signal.alarm(LIMIT)
    exec(setup, {})
    if words[:1] == ["run"]:
        fork_kernels(CopiedServer.start_here())
    return ebt_nb.cli.main.main(words)


def run_program(words: list[str]) -> int:
    "Do the work of a program of `Forker.write_program`; unlike those of the server, its outputs may be pipes."
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    return run_after_setup(words)


def run_script(words: list[str]) -> int:
    "Be `python -c SCRIPT ARGUMENTS`, given the words after -c."
    script, *arguments = words
    signal.alarm(LIMIT)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    return 0


def run_kernel(words: list[str]) -> int:
    "Be the kernel of a notebook, started with these arguments; `fit_many` in it forks its runs."
    from ipykernel.kernelapp import launch_new_instance

    import ebt_nb.jobs.parallel

    CopiedServer.start_here()
    ebt_nb.jobs.parallel.ForkServer = CopiedServer
    launch_new_instance(argv=[*words, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends with its parent
    return 0


def fork_kernels(server: ForkServer) -> None:
    "Let kernels that this process starts from now on be forked by a server."
    from jupyter_client.provisioning import LocalProvisioner

    async def launch_kernel(self, command, **settings):
        words = command[command.index("ipykernel_launcher") + 1 :]
        self.process = server.start(
            words,
            settings["stdout"].name,
            cwd=settings.get("cwd", "."),
            environment=settings["env"],
            new_session=True,
            function="forked:run_kernel",
        )
        self.process.stdin = self.process.stdout = self.process.stderr = None
        self.pid = self.pgid = self.process.pid
        return self.connection_info

    LocalProvisioner.launch_kernel = launch_kernel


class CopiedServer(ForkServer):
    "A server that is a copy of this process, made before it has threads; there is one, and it is used again and again."

    def __init__(self, *preloaded_and_environment):
        "Use the server that `start_here` started, whatever it is asked to import."
        self.process = self.copy

    def close(self) -> None:
        "Do nothing; the server ends with this process."

    @classmethod
    def start_here(cls) -> "CopiedServer":
        "Copy this process, and let the copy serve."
        (orders, to_server), (from_server, answers) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            signal.alarm(0)
            os.dup2(orders, 0)
            os.dup2(answers, 1)
            for number in (orders, to_server, from_server, answers):
                os.close(number)
            sys.stdin = os.fdopen(0, closefd=False)
            serve()
            end_process(0)
        os.close(orders)
        os.close(answers)
        cls.copy = CopiedProcess(pid, os.fdopen(to_server, "w"), os.fdopen(from_server))
        server = cls()
        server._write([])  # modules to import
        return server


class CopiedProcess:
    "What a `ForkServer` uses of `subprocess.Popen`."

    def __init__(self, pid, stdin, stdout):
        self.pid, self.stdin, self.stdout = pid, stdin, stdout

    def wait(self) -> int:
        "Wait for the end of the process; return its exit code."
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class SharedServer(ForkServer):
    "A server that threads use at the same time."

    def __init__(self, *preloaded_and_environment):
        self.lock = threading.Lock()
        super().__init__(*preloaded_and_environment)

    def send(self, order: dict) -> int | None:
        "Send an order and wait for its answer while no other thread does."
        with self.lock:
            return super().send(order)


# A program that others start as they start `ebt`: it has its work done by a forked process, passes on signals, and ends
# as that one does.
PROXY = """\
#!{python} -IS
import json, os, signal, socket, sys

forker = socket.socket(socket.AF_UNIX)
forker.connect({address!r})
answers = forker.makefile()
files = [f"/proc/{{os.getpid()}}/fd/{{number}}" for number in (1, 2)]
order = dict(words=[{setup!r}, *sys.argv[1:]], files=files, cwd=os.getcwd(), environment=dict(os.environ))
forker.sendall(json.dumps(order).encode() + b"\\n")
pid = int(answers.readline())
for number in {signals}:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Forker:
    """Starts `ebt` commands, each in a session of its own, and waits for them.

    Its methods may be called from several threads at once.
    """

    def __init__(self):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment["OMP_NUM_THREADS"] = "1"
        path = os.pathsep.join(filter(None, (TESTS, environment.get("PYTHONPATH"))))
        modules = ("ebt_nb.jobs.notebook_jobs", "ebt_nb.inference.evaluate", "ebt_nb.inference.generate")
        self.environment = environment | {"PYTHONPATH": path}
        modules += ("ipykernel.kernelapp", "nbconvert", "papermill", "forked")
        self.server = SharedServer((*PRELOADED, *modules), self.environment)
        self.commands = {}  # by process id
        self.listener = None

    def start(
        self,
        *words,
        cwd: Path | str = ".",
        out: Path | str = os.devnull,
        err: Path | str | None = None,
        environment: dict[str, str] | None = None,
        setup: str = "",
        function: str = "run_after_setup",
    ) -> int:
        """Start `ebt WORDS` in a folder and return its process id; its output is appended to one file, or two.

        `setup` is Python code that the process executes before the command. `function` of this module gets both.
        """
        command = self.server.start(
            [setup, *words],
            out,
            err,
            cwd=cwd,
            environment=self.environment | (environment or {}),
            new_session=True,
            function=f"forked:{function}",
        )
        self.commands[command.pid] = command
        return command.pid

    def is_running(self, pid: int) -> bool:
        "Return whether a process that was started here has not ended yet."
        return self.commands[pid].poll() is None

    def wait(self, pid: int) -> int:
        "Wait for a process that was started here; return its exit code."
        return self.commands.pop(pid).wait()

    def run(self, *words, **options) -> tuple[int, str, str]:
        "Run a command to its end; return exit code, output and errors."
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self.wait(self.start(*words, out=out, err=err, **options))
            return code, out.read_text(), err.read_text()

    def run_script(self, script: str, *arguments, **options) -> tuple[int, str, str]:
        "Run `python -c SCRIPT ARGUMENTS` to its end; return exit code, output and errors."
        return self.run(*arguments, setup=script, function="run_script", **options)

    def run_ranks(self, *words, **options) -> list[tuple[int, str, str]]:
        "Run a command as the two ranks of a launcher; return exit code, output and errors of each."
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        with tempfile.TemporaryDirectory() as folder:
            ids, files = [], []
            for rank in ("0", "1"):
                names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
                environment = names | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                out, err = Path(folder, f"out{rank}"), Path(folder, f"err{rank}")
                files.append((out, err))
                ids.append(self.start(*words, out=out, err=err, environment=environment, **options))
            codes = [self.wait(pid) for pid in ids]
            return [(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files)]

    def write_program(self, path: Path, setup: str = "") -> Path:
        """Write a program that is `ebt` for whoever starts it, such as Slurm, and need not import anything.

        The process that does its work executes `setup` first. It is killed when the program is.
        """
        if self.listener is None:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(f"\0forker-{os.getpid()}")  # a name that is no file
            self.listener.listen()
            threading.Thread(target=self._accept, daemon=True).start()
        signals = [int(number) for number in (signal.SIGINT, *STOP_SIGNALS)]
        address = self.listener.getsockname()
        path.write_text(PROXY.format(python=sys.executable, address=address, setup=setup, signals=signals))
        path.chmod(0o755)
        return path

    def _accept(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._run_for, args=(connection,), daemon=True).start()

    def _run_for(self, connection):
        "Run the command of a program that `write_program` wrote."
        with connection, connection.makefile("rw") as program:
            order = json.loads(program.readline())
            output, errors = order["files"]
            place = dict(cwd=order["cwd"], environment=order["environment"], new_session=True)
            command = self.server.start(order["words"], output, errors, **place, function="forked:run_program")
            print(command.pid, file=program, flush=True)
            while command.poll() is None:
                if select.select([connection], [], [], 0.05)[0]:  # the program has ended before its command
                    os.kill(command.pid, signal.SIGKILL)
                    command.wait()
                    return
            print(command.returncode, file=program, flush=True)

    def close(self) -> None:
        "End the process that forks."
        self.server.close()
