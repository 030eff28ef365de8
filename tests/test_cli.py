"The installed `ebt` command, as a user meets it: exit codes, messages, what is left behind."

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from ebt_nb.cli.main import main
from ebt_nb.config.models import SIZES
from ebt_nb.config.overrides import build_config, load_config
from ebt_nb.config.presets import PRESETS
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile
from ebt_nb.runs.status import read_status

EBT = Path(sys.executable).with_name("ebt")
PARAMETERS = 'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ngreeting = "hello"\ntimes = 2'


def ebt(*words, **options):
    "Run a command; return exit code, output and errors."
    done = subprocess.run(
        [EBT, *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def notebook(tmp_path):
    "A function that makes a job notebook of the given cells."

    def make(*cells):
        first = nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"]))
        book = nbformat.v4.new_notebook(
            cells=[first, *map(nbformat.v4.new_code_cell, cells)],
            metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
        )
        nbformat.write(book, tmp_path / "job.ipynb")
        return tmp_path / "job.ipynb"

    return make


def only_folder(runs):
    [status] = runs.rglob("status.json")
    return status.parent


# Looking things up


def test_presets_at_every_size(tmp_path, capsys):
    assert ebt("presets")[1].split("\n")[0].startswith("text/ebt_s1 ")
    for name in PRESETS:
        code = main(["presets", name, "--size", "small"])
        out, err = capsys.readouterr()
        (tmp_path / "config.yaml").write_text(out)
        assert (code, err) == (0, "") and load_config(tmp_path / "config.yaml").model.width == SIZES["small"].width


def test_version_and_help(capsys):
    for words, start in [(["--version"], r"ebt \d+\.\d+"), ([], r"usage: ebt "), (["--help"], r"usage: ebt ")]:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0 and re.match(start, capsys.readouterr().out)


def test_json_of_a_run_that_diverged_is_strict(tmp_path, capsys):
    "What is no number is null, in the output of every command."
    for name in ("first", "second"):
        run = Run.create(build_config("text/quickstart", {"run.runs_dir": str(tmp_path), "run.name": name}))
        for step, loss in enumerate([7.5, math.nan, math.inf], 1):
            MetricsFile(run.dir / "metrics.csv").append({"step": step, "train/loss": loss, "val/loss": loss})

    def refuse(word):
        raise AssertionError(word)

    for words in (["list"], ["show", "first"], ["compare", "first", "second"], ["clean", "--hours", "0"]):
        assert main(["runs", *words, "--runs-dir", str(tmp_path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out, parse_constant=refuse)
        assert main(["runs", *words, "--runs-dir", str(tmp_path)]) == 0 and capsys.readouterr().out
        if words == ["list"]:
            assert [row["lowest_val_loss"] for row in found] == [7.5, 7.5]
        if words[0] == "show":
            assert found["metrics"] == {"train/loss": None, "val/loss": None}


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"'{EBT}' presets --keys | head -1", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("run.name: str") and done.stderr == ""


# Wrong input: one clear message, exit code 2, nothing created


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "text/quikstart"], r"'text/quikstart': no such preset \(did you mean 'text/quickstart'\?\)"),
        (["-p", "model.sise=xxs"], r"model.sise: no such key \(did you mean 'model.size'\?\)"),
        (["-p", "greting=hi"], r"greting: job has no such parameter \(did you mean 'greeting'\?\)"),
        (["-p", "max_steps=3"], r"max_steps: job has no such parameter \(did you mean 'trainer.max_steps'\?\)"),
        (["-p", "trainer.max_steps=many"], r"trainer.max_steps: .*got 'many'"),
        (["-p", "times=many"], r"times: expects int, such as 2; got 'many'"),
        (["-p", "model.heads=7"], r"model.heads: width 128 cannot be divided into 7 heads"),
        (["-p", "model.size=huge"], r"model.size: 'huge' is not a size; choose from 4xs"),
        (["-p", "greeting"], r"'greeting': an override has the form key=value"),
        (["-p", "run_dir=/tmp"], r"run_dir: set it with --runs-dir"),
        (["-p", "data.source=missing.txt"], r"data.source: missing.txt: no such file"),
        (["-p", "data.source={tmp}/empty.txt"], r"empty.txt: is empty"),
        (["-p", "data.source={tmp}/binary.txt"], r"binary.txt: a binary file"),
        (["--runs-dir", "{tmp}/job.ipynb/runs"], r"job.ipynb/runs/.*cannot create this folder \(Not a directory\)"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_created(tmp_path, notebook, monkeypatch, capsys, words, message):
    job = notebook("open('ran', 'w')")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"GIF89a\0\0\1")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = main(
        ["run", str(job), *(word.format(tmp=tmp_path) for word in words), "-p", f"data.cache_dir={tmp_path}/cache"]
    )
    printed = capsys.readouterr()
    assert code == 2 and printed.out == "" and re.match(f"ebt: .*{message}", printed.err), printed.err
    assert len(printed.err.strip().splitlines()) == 1 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "no_such_job"], "no_such_job: no such experiment"),
        (["run", "no_such.ipynb"], "no_such.ipynb: no such notebook"),
        (["train", "no_such.yaml"], "no_such.yaml: cannot read this configuration"),
        (["train", "broken.yaml"], "model.widht: no such key.*did you mean 'model.width'"),
        (["train", "--resume", "no_such_run"], "no_such_run: no such run below"),
        (["runs", "show", "no_such_run"], "no_such_run: no such run below"),
        (["runs", "--size"], "unrecognized arguments: --size"),
    ],
)
def test_other_commands_refuse_wrong_input(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "broken.yaml").write_text("format: 2\nmodel: {widht: 3}")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (
        code == 2
        and printed.out == ""
        and re.search(message, printed.err)
        and [p.name for p in tmp_path.iterdir()] == ["broken.yaml"]
    )


def test_wrong_input_to_the_installed_command(tmp_path):
    assert ebt("train", "no_such.yaml", cwd=tmp_path) == (
        2,
        "",
        "ebt: no_such.yaml: cannot read this configuration (No such file or directory)\n",
    )


# Jobs


def test_a_job_leaves_its_report_and_prints_its_path(tmp_path, notebook):
    job = notebook(
        "print(*[greeting] * times, overrides['model.size'])",
        "import os, pathlib\nassert os.getcwd() == run_dir",
        "n = pathlib.Path('summary.txt').write_text('model  loss')",
    )
    code, out, err = ebt(
        "run",
        job,
        "--preset",
        "text/quickstart",
        "-p",
        "model.size=xxs",
        "-p",
        "greeting=bye",
        "--runs-dir",
        "runs",
        cwd=tmp_path,
    )
    folder = only_folder(tmp_path / "runs")
    assert (code, err) == (0, "") and folder.parent == tmp_path / "runs/text/quickstart"
    assert "bye bye xxs\n" in out and out.endswith(f"model  loss\n\nreport: {folder}/report.html\n")
    assert sorted(p.name for p in folder.iterdir()) == [
        "console.log",
        "report.html",
        "report.ipynb",
        "status.json",
        "summary.txt",
    ]
    assert (
        read_status(folder)["status"] == "done"
        and read_status(folder)["parameters"]["overrides"]["model.size"] == "xxs"
    )


def test_output_of_a_cell_is_shown_while_it_runs(tmp_path, notebook):
    job = notebook(
        "import os, time\nprint('step 1')\n"
        f"while not os.path.exists('{tmp_path}/seen'): time.sleep(0.05)\nprint('step 2')"
    )
    with subprocess.Popen(
        [EBT, "run", job, "--runs-dir", tmp_path / "runs"], stdout=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stdout.readline, "")
        assert "step 1\n" in lines  # the cell continues only once its first line has arrived here
        (tmp_path / "seen").touch()
        assert "step 2\n" in process.communicate()[0]
    assert process.returncode == 0


def test_a_job_outlives_its_terminal(tmp_path, notebook):
    job = notebook(
        "import os, time\nprint('step 1')\n"
        f"while not os.path.exists('{tmp_path}/gone'): time.sleep(0.05)\nprint('step 2')"
    )
    with subprocess.Popen(
        [EBT, "run", job, "--runs-dir", tmp_path / "runs"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert "step 1\n" in iter(process.stdout.readline, "")
        process.stdout.close()
        (tmp_path / "gone").touch()
        process.wait()
    folder = only_folder(tmp_path / "runs")
    assert read_status(folder)["status"] == "done" and "step 1\nstep 2\n" in (folder / "console.log").read_text()


def test_a_failing_cell(tmp_path, notebook, forker):
    code, out, err = forker.run(
        "run", notebook("print('so far so good')", "{}['missing']", "print('never')"), "--runs-dir", tmp_path / "runs"
    )
    folder = only_folder(tmp_path / "runs")
    assert (
        code == 1
        and err
        == f"ebt: job failed: KeyError: 'missing'\nThe report so far: {folder}/report.html\n"
        f"When the cause is removed, resume with `ebt run {tmp_path}/job.ipynb --folder {folder}`\n"
    )
    assert "so far so good" in out and "never" not in out and "KeyError" in (folder / "report.html").read_text()
    assert read_status(folder)["status"] == "failed"


def test_a_notebook_whose_process_is_killed(tmp_path, notebook, forker):
    code, _out, err = forker.run(
        "run",
        notebook("print('so far so good', flush=True)", "import os\nos.kill(os.getpid(), 9)"),
        "--runs-dir",
        tmp_path / "runs",
    )
    folder = only_folder(tmp_path / "runs")
    assert code == 1 and "job failed: the notebook's process ended" in err and "Traceback" not in err
    assert read_status(folder)["status"] == "failed" and "so far so good" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "number, handler",
    [
        (signal.SIGINT, "except KeyboardInterrupt: print('saved'); raise"),
        (signal.SIGTERM, "except KeyboardInterrupt: print('saved')"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_interrupted(tmp_path, notebook, number, handler, forker):
    install = "import signal\nsignal.signal(signal.SIGTERM, signal.default_int_handler)"
    job = notebook(
        install, f"import time\nprint('training')\ntry:\n    while True: time.sleep(0.05)\n{handler}", "print('never')"
    )
    output, errors = tmp_path / "output", tmp_path / "errors"
    pid = forker.start("run", job, "--runs-dir", tmp_path / "runs", out=output, err=errors)
    while not (output.exists() and "training\n" in output.read_text()):
        assert forker.is_running(pid), errors.read_text()
        time.sleep(0.05)
    os.kill(pid, number)
    code, out, err = forker.wait(pid), output.read_text(), errors.read_text()
    folder = only_folder(tmp_path / "runs")
    assert code == 130
    assert err == f"ebt: job: interrupted; resume with `ebt run {job} --folder {folder}`\n"
    assert "saved" in out and "never" not in out and "saved" in (folder / "report.html").read_text()
    assert read_status(folder)["status"] == "interrupted"


def test_the_third_interrupt_ends_a_notebook_that_ignores_signals(tmp_path, notebook):
    job = notebook(
        "import signal, time\n"
        "previous = signal.signal(signal.SIGINT, lambda *_: print('not now'))\n"
        "print('training')\n"
        "while True: time.sleep(0.05)",
    )
    with subprocess.Popen(
        [EBT, "run", job, "--runs-dir", tmp_path / "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stdout.readline, "")
        assert "training\n" in lines
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            assert "not now\n" in lines
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate()
    assert (
        process.returncode == 130
        and re.search(r"ebt: job: interrupted; resume with .*\n$", err)
        and "Traceback" not in err
    )
    assert read_status(only_folder(tmp_path / "runs"))["status"] == "interrupted"


# Training from a file


def test_train_list_and_resume(tmp_path, forker):
    tiny = {
        "model.width": 32,
        "model.heads": 2,
        "data.context": 16,
        "data.batch_size": 4,
        "trainer.val_batches": 1,
        "trainer.threads": 1,
    }
    for name, steps in [("short", 2), ("longer", 4)]:
        (tmp_path / f"{name}.yaml").write_text(
            build_config("text/quickstart", tiny | {"trainer.max_steps": steps}).to_yaml()
        )
    code, out, err = ebt("train", "short.yaml", cwd=tmp_path)
    assert code == 0 and "step 2/2" in out, err
    code, out, err = forker.run("train", "longer.yaml", "--resume", "text/quickstart", cwd=tmp_path)
    assert code == 0 and "resumed at step 2" in out and "step 4/4" in out, err
    [run] = find_runs(tmp_path / "runs")
    _header, line = ebt("runs", cwd=tmp_path)[1].splitlines()
    assert line.split()[:3] == [f"text/quickstart/{run.dir.name}", "done", "4"]
    assert f"folder: {run.dir}\nstatus: done\n" in ebt("runs", "show", run.dir.name, cwd=tmp_path)[1]


# JupyterLab


def test_lab_serves_the_checkout_with_settings_of_its_own(tmp_path):
    environment = os.environ | dict(
        JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"), JUPYTER_CONFIG_DIR=str(tmp_path / "config")
    )
    words = ["lab", "--no-browser", "--ip", "127.0.0.1", "--port", "0", "--IdentityProvider.token=secret"] + [
        "--allow-root"
    ] * (os.geteuid() == 0)
    with subprocess.Popen(
        [EBT, *words], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            file = tmp_path / f"runtime/jpserver-{server.pid}.json"  # `ebt lab` becomes the server, so it has its pid
            for _ in range(600):
                if file.is_file() and file.read_text().strip().endswith("}"):
                    break
                assert server.poll() is None
                time.sleep(0.1)
            url = json.loads(file.read_text())["url"]

            def get(path):
                request = urllib.request.Request(url + path, headers={"Authorization": "token secret"})
                return json.load(urllib.request.urlopen(request, timeout=30))

            for _ in range(600):  # it writes its address before it listens
                try:
                    get("api/status")
                    break
                except urllib.error.URLError:
                    assert server.poll() is None
                    time.sleep(0.1)
            assert "kernels" in get("api/status")
            assert {"README.md", "nbs"} <= {entry["name"] for entry in get("api/contents")["content"]}
            notification = "lab/api/settings/@jupyterlab/apputils-extension:notification"
            assert get(notification)["schema"]["properties"]["fetchNews"]["default"] == "false"
        finally:
            server.terminate()
