"""`ebt submit` without a Slurm: what is refused before anything is made, and the same scripts run here (`--cluster none`)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from ebt_nb.cli.main import main
from ebt_nb.runs.folders import read_status

EBT = Path(sys.executable).with_name("ebt")


@pytest.fixture
def here(tmp_path):
    "A folder with a notebook, a script and nothing else."
    first = nbformat.v4.new_code_cell(
        'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ngreeting = "hello"',
        metadata=dict(tags=["parameters"]),
    )
    cells = [first, nbformat.v4.new_code_cell("print(greeting, overrides['optim.peak_lr'])\nassert greeting != 'bad'")]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        ),
        tmp_path / "greet.ipynb",
    )
    (tmp_path / "job.sh").write_text(
        '#!/usr/bin/env bash\n#SBATCH --time=10\n#SBATCH --mem-per-cpu=1G\ntouch began\necho "got: $* ${COLOUR:-none}"\nexec sleep "${SECONDS_TO_SLEEP:-0}"\n'
    )
    return tmp_path


def submit(here, *words):
    "Exit code, output, errors."
    done = subprocess.run(
        [EBT, "submit", *map(str, words)],
        cwd=here,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
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
        (["job.sh", "--cluster", "local_cpu"], ["sbatch: not found", "--cluster none"]),
        (["job.sh", "--cluster", "none", "--runs-dir", "job.sh/runs"], ["job.sh/runs", "--runs-dir"]),
    ],
)
def test_refused_with_nothing_made(words, parts, here, monkeypatch, capsys):
    before = sorted(here.rglob("*"))
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", str(here))  # no Slurm to be found, whatever is installed
    try:
        code = main(["submit", *words])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and all(part in said.err for part in parts), said.err
    assert sorted(here.rglob("*")) == before


def test_a_dry_run_shows_the_script_and_makes_nothing(here, monkeypatch, capsys):
    before = sorted(here.rglob("*"))
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", str(here))
    code = main(
        [
            "submit",
            "job.sh",
            "--cluster",
            "reference_h100",
            "--array",
            "COLOUR=red,blue",
            "--after",
            "12",
            "--sbatch",
            "account=physics",
            "--dry-run",
            "--",
            "--fast",
        ]
    )
    out, err = capsys.readouterr()
    assert code == 0 and sorted(here.rglob("*")) == before and "nothing was made or sent" in err
    lines = out.splitlines()
    for line in (
        "#SBATCH --time=10",
        "#SBATCH --mem-per-cpu=1G",
        "#SBATCH --gpus-per-node=h100:1",
        "#SBATCH --account=physics",
        "#SBATCH --array=0-1",
        "#SBATCH --dependency=afterok:12",
        "#SBATCH --kill-on-invalid-dep=yes",
    ):
        assert line in lines
    assert (
        "--mem=" not in out and out.count("--time=") == 1 and "    1) export COLOUR=blue; set -- --fast ;;" in lines
    )  # the script's wins over the header's


def test_an_array_of_a_notebook_here(here):
    "Tasks run one after the other; one that fails does not stop the next, and is told at the end."
    code, out, err = submit(
        here,
        "greet.ipynb",
        "--cluster",
        "none",
        "--array",
        "greeting=bad,good day",
        "-p",
        "optim.peak_lr=1e-3",
        "--runs-dir",
        "runs",
    )
    [script] = (here / "runs").rglob("job.slurm")
    assert (
        code == 1
        and f"{script}: task 0 ended with exit code 1" in err
        and "bad 0.001" in out
        and "good day 0.001" in out
    )
    assert [read_status(script.parent / f"task-{i}")["status"] for i in range(2)] == ["failed", "done"]
    assert (script.parent / "array.tsv").read_text().splitlines() == [
        "task\tgreeting",
        "0\tbad",
        "1\tgood day",
    ] and "1) set -- -p 'greeting=good day' ;;" in script.read_text()
    done = subprocess.run(
        ["bash", script],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "is done there" in done.stderr


def test_a_script_here(here):
    code, out, err = submit(
        here, "job.sh", "--cluster", "none", "-p", "model.size=xs", "--runs-dir", "runs", "--", "two words"
    )
    [script] = (here / "runs/job").rglob("job.slurm")
    assert (
        (code, out) == (0, "got: two words -p model.size=xs none\n")
        and str(script) in err
        and "#SBATCH --time=10" in script.read_text()
    )


def test_a_script_here_is_told_to_stop(here):
    process = subprocess.Popen(
        [EBT, "submit", "job.sh", "--cluster", "none"],
        cwd=here,
        env=os.environ | {"SECONDS_TO_SLEEP": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("got:")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "ended with exit code -15" in err
