"""Run `ebt` in its own process without importing anything first: it is forked from a process that has all imports.

Everything else is as with the installed command, which each file of tests also starts once or twice.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORKER = """
import gc, json, os, signal, sys, traceback
gc.set_threshold(10_000)
import nbconvert, papermill
import ebt_nb.cli.main, ebt_nb.jobs.launch, ebt_nb.jobs.notebook_jobs, ebt_nb.inference.evaluate
import ebt_nb.inference.generate

def run_command(order):
    os.setsid()
    signal.alarm(600)
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(order["files"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        exec(order["setup"], {})
        code = ebt_nb.cli.main.main(order["words"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        run_command(order)
"""


class Forker:
    "Starts `ebt` commands, each in a session of its own, and waits for them."

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def send(self, order) -> int:
        "Send an order (a command, or a process to wait for); return the number that is the answer."
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self,
        *words,
        cwd: Path | str = ".",
        out: Path | str = os.devnull,
        err: Path | str | None = None,
        environment: dict[str, str] | None = None,
        setup: str = "",
    ) -> int:
        """Start `ebt WORDS` in a folder and return its process id; its output is appended to one file, or two.

        `setup` is Python code that the process executes before the command.
        """
        return self.send(
            dict(
                words=[*map(str, words)],
                cwd=str(Path(cwd).absolute()),
                files=[str(out), str(err or out)],
                environment=environment or {},
                setup=setup,
            )
        )

    def wait(self, pid: int) -> int:
        "Wait for a process that was started here; return its exit code."
        return self.send(pid)

    def run(self, *words, **options) -> tuple[int, str, str]:
        "Run a command to its end; return exit code, output and errors."
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self.wait(self.start(*words, out=out, err=err, **options))
            return code, out.read_text(), err.read_text()

    def close(self) -> None:
        "End the process that forks."
        self.process.stdin.close()
        self.process.wait()
