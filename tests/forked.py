"""`ebt` in a process of its own, without the seconds that its imports take: forked from one that has done them.

Everything else is as with the installed command, which each file of tests also starts once or twice."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORKER = """
import json, os, signal, sys, traceback
import nbconvert, papermill
import ebt_nb.cli.main, ebt_nb.jobs.launch, ebt_nb.jobs.notebook_jobs, ebt_nb.inference.evaluate, ebt_nb.inference.generate
for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int): print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
    elif child := os.fork(): print(child, flush=True)
    else:
        os.setsid(), signal.alarm(300)
        os.chdir(order["cwd"])
        os.environ.update(order["environment"])
        for number, (path, how) in enumerate([(os.devnull, os.O_RDONLY), *((path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in order["files"])]): os.dup2(os.open(path, how), number)
        code = 1
        try: code = ebt_nb.cli.main.main(order["words"])
        except SystemExit as stop: code = stop.code
        except BaseException: traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
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

    def ask(self, order) -> int:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(
        self,
        *words,
        cwd: Path | str = ".",
        out: Path | str = os.devnull,
        err: Path | str | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        "The process that executes `ebt WORDS` in a folder; what it prints is added to a file, or two."
        return self.ask(
            dict(
                words=[*map(str, words)],
                cwd=str(Path(cwd).absolute()),
                files=[str(out), str(err or out)],
                environment=environment or {},
            )
        )

    def wait(self, pid: int) -> int:
        return self.ask(pid)

    def run(self, *words, **options) -> tuple[int, str, str]:
        "Run a command to its end: exit code, output, errors."
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self.wait(self.start(*words, out=out, err=err, **options))
            return code, out.read_text(), err.read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
