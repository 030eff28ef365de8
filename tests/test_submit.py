"""`ebt submit` without a Slurm.

What is refused before anything is created, and the same scripts run on this machine (`--cluster none`).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from ebt_nb.cli.main import main
from ebt_nb.runs.status import read_status

EBT = Path(sys.executable).with_name("ebt")


LONG = 600  # seconds after which waiting is given up
JOB_SCRIPT = """#!/usr/bin/env bash
#SBATCH --time=10
#SBATCH --mem-per-cpu=1G
touch began
echo "got: $* ${COLOUR:-none}"
exec sleep "${SECONDS_TO_SLEEP:-0}"
"""


@pytest.fixture
def folder(tmp_path):
    "A folder with a notebook, a script and nothing else."
    parameters = 'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ngreeting = "hello"'
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("print(greeting, overrides['optim.peak_lr'])\nassert greeting != 'bad'"),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, tmp_path / "greet.ipynb")
    (tmp_path / "job.sh").write_text(JOB_SCRIPT)
    return tmp_path


def submit(folder, *words):
    "Run `ebt submit` in a folder; return exit code, output and errors."
    done = subprocess.run(
        [EBT, "submit", *map(str, words)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words, parts",
    [
        (["job.sh"], ["--cluster"]),
        (
            ["job.sh", "--cluster", "reference_a10"],
            [
                "--cluster reference_a10: no such cluster",
                "did you mean 'reference_a100'",
                "local_cpu",
                "reference_h100",
            ],
        ),
        (["jobs.sh", "--cluster", "none"], ["jobs.sh: no such script or experiment"]),
        (["pretrian", "--cluster", "none"], ["did you mean 'pretrain'"]),
        (
            ["greet.ipynb", "--cluster", "none", "--array", "optim.peek_lr=1,2"],
            ["optim.peek_lr: no such key", "did you mean 'optim.peak_lr'"],
        ),
        (
            ["greet.ipynb", "--cluster", "none", "--array", "greting=1,2"],
            ["greting: greet has no such parameter", "did you mean 'greeting'"],
        ),
        (["greet.ipynb", "--cluster", "none", "--array", "optim.peak_lr=1e-3,fast"], ["optim.peak_lr", "got 'fast'"]),
        (["greet.ipynb", "--cluster", "none", "--preset", "text/quikstart"], ["text/quikstart", "did you mean"]),
        (
            ["job.sh", "--cluster", "none", "--array", "COLOR=1,2"],
            ["COLOR: job.sh cannot be given this", "did you mean 'COLOUR'"],
        ),
        (["job.sh", "--cluster", "none", "--array", "run.seed"], ["--array run.seed", "name=value"]),
        (["job.sh", "--cluster", "none", "-p", "model.sise=xs"], ["model.sise", "did you mean 'model.size'"]),
        (["job.sh", "--cluster", "local_cpu", "--after", "yesterday"], ["--after yesterday", "slurm.json"]),
        (["job.sh", "--cluster", "local_cpu", "--sbatch", "time=tomorrow"], ["--time=tomorrow: is not a time limit"]),
        (
            ["job.sh", "--cluster", "local_cpu", "--sbatch", "mem=8G", "--sbatch", "mem-per-gpu=8G"],
            ["--mem=8G and --mem-per-gpu=8G: sbatch accepts only one"],
        ),
        (["job.sh", "--cluster", "local_cpu"], ["sbatch: not found", "--cluster none"]),
        (["job.sh", "--cluster", "none", "--runs-dir", "job.sh/runs"], ["job.sh/runs", "--runs-dir"]),
    ],
)
def test_refused_with_nothing_created(words, parts, folder, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder))  # no Slurm is found, whatever is installed
    try:
        code = main(["submit", *words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and all(part in err for part in parts), err
    assert sorted(folder.rglob("*")) == before


def test_dry_run_shows_the_script_and_creates_nothing(folder, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder))
    options = ["--cluster", "reference_h100", "--array", "COLOUR=red,blue", "--after", "12"]
    options += ["--sbatch", "account=physics", "--sbatch=-q high", "--dry-run"]
    code = main(["submit", "job.sh", *options, "--", "--fast"])
    out, err = capsys.readouterr()
    assert code == 0 and sorted(folder.rglob("*")) == before and "nothing was created or sent" in err
    lines = out.splitlines()
    for line in (
        "#SBATCH --time=10",
        "#SBATCH --mem-per-cpu=1G",
        "#SBATCH --gpus-per-node=h100:1",
        "#SBATCH --account=physics",
        "#SBATCH --qos=high",
        "#SBATCH --array=0-1",
        "#SBATCH --dependency=afterok:12",
        "#SBATCH --kill-on-invalid-dep=yes",
        "    1) export COLOUR=blue; set -- --fast ;;",
    ):
        assert line in lines
    assert "--mem=" not in out and out.count("--time=") == 1  # the script's options win over the header's


def test_array_of_a_notebook_on_this_machine(folder):
    "Tasks run one after the other; one that fails does not stop the next, and is reported at the end."
    options = ["--array", "greeting=bad,good day", "-p", "optim.peak_lr=1e-3", "--runs-dir", "runs"]
    code, out, err = submit(folder, "greet.ipynb", "--cluster", "none", *options)
    [script] = (folder / "runs").rglob("job.slurm")
    assert code == 1 and f"{script}: task 0 ended with exit code 1" in err
    assert "bad 0.001" in out and "good day 0.001" in out
    assert [read_status(script.parent / f"task-{index}")["status"] for index in range(2)] == ["failed", "done"]
    assert (script.parent / "array.tsv").read_text().splitlines() == ["task\tgreeting", "0\tbad", "1\tgood day"]
    assert "1) set -- -p 'greeting=good day' ;;" in script.read_text()
    done = subprocess.run(
        ["bash", script],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 2 and "is already done in it" in done.stderr


def test_script_on_this_machine(folder):
    options = ["--cluster", "none", "-p", "model.size=xs", "--runs-dir", "runs"]
    code, out, err = submit(folder, "job.sh", *options, "--", "two words")
    [script] = (folder / "runs/job").rglob("job.slurm")
    assert (code, out) == (0, "got: two words -p model.size=xs none\n")
    assert str(script) in err and "#SBATCH --time=10" in script.read_text()


def has_handler(process, number):
    "Whether a process has installed a handler for a signal, as Linux sees it."
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def stop_with_sigterm(folder, *words):
    "Run `ebt submit` here, send it SIGTERM when its script has begun; return exit code, further output and errors."
    process = subprocess.Popen(
        [EBT, "submit", "job.sh", "--cluster", "none", *words],
        cwd=folder,
        env=os.environ | {"SECONDS_TO_SLEEP": "3600"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("got:")
    deadline = time.monotonic() + LONG
    while not has_handler(process, signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


def test_sigterm_reaches_a_script_on_this_machine(folder):
    code, out, err = stop_with_sigterm(folder)
    assert (code, out) == (1, "") and "job.slurm: ended with exit code -15; its output is above" in err


@pytest.mark.parametrize("handles_signal", [False, True])
def test_sigterm_ends_an_array_on_this_machine(handles_signal, folder):
    "The task that runs gets the signal, and no other is started, even if that task ends well."
    if handles_signal:
        loop = 'while [ "${SECONDS_TO_SLEEP:-0}" -gt 0 ]; do sleep 0.1; done'
        lines = JOB_SCRIPT.replace("touch began", "trap 'exit 0' TERM").splitlines()
        (folder / "job.sh").write_text("\n".join([*lines[:-1], loop, ""]))
    code, out, err = stop_with_sigterm(folder, "--array", "SECONDS_TO_SLEEP=3600,0")
    assert (code, out) == (1, "")  # the next task would write a line
    assert "after SIGTERM 1 of 2 tasks did not start" in err
    assert ("task 0 ended with exit code -15" in err) != handles_signal
