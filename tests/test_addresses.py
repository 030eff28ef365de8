"Addresses of runs and checkpoints wherever one is taken, site-wide defaults, and checkpoints sent away and brought back: real runs, real commands."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml

from ebt_nb.runs import wandb_runs
from ebt_nb.cli.main import main
from ebt_nb.config.config import load_config
from ebt_nb.jobs.bookkeeping import leftovers
from ebt_nb.runs.folders import Run, find_checkpoint, find_checkpoints, find_run, find_runs, step_of
from ebt_nb.training.base import read_checkpoint

EBT = Path(sys.executable).with_name("ebt")
SITE = """
model: {layers: 1, width: 32, heads: 2}
data: {context: 16, batch_size: 4, max_documents: 50, cache_dir: cache}
trainer: {max_steps: 8, val_every: 4, val_batches: 2, log_every: 2, checkpoint_every: 4, keep_every: 2, threads: 1, accelerator: cpu}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with site-wide defaults for tiny runs, and one run in it of 8 updates, made by `ebt train`."
    folder, before = tmp_path_factory.mktemp("site"), Path.cwd()
    (folder / "ebt_defaults.yaml").write_text(SITE)
    os.chdir(folder)
    try:
        assert main(["train", "--preset", "text/quickstart", "-p", "run.name=trial"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def ebt(site, monkeypatch, capsys):
    "A function that runs a command in the site's folder: exit code, output, errors."
    monkeypatch.chdir(site)

    def call(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def copy_of(site, name):
    "Another run, with the checkpoints of the first, that a test may change."
    [run] = [run for run in find_runs(site / "runs") if run.name == "trial" and run.dir.parent.name == "trial"]
    shutil.copytree(run.dir, site / "runs" / name / run.dir.name)
    return Run.open(site / "runs" / name / run.dir.name)


# Addresses


def test_steps_are_read_from_what_torch_writes(site):
    run = find_run("trial", site / "runs")
    for path in run.dir.glob("checkpoints/*.ckpt"):
        assert step_of(path) == read_checkpoint(path)["global_step"]
    assert [step_of(path) for path in run.checkpoints] == [2, 4, 6, 8]
    best = min((row["val/loss"], row["step"]) for row in run.metrics if "val/loss" in row)[1]
    assert step_of(run.checkpoint("best")) == best and run.checkpoint("best/step").name == f"step={best:06d}.ckpt"
    weights = [read_checkpoint(run.checkpoint(which))["state_dict"] for which in ("best", "best/step")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "address, step", [("trial", 8), ("trial:last", 8), ("trial:step=4", 4), ("trial:1", 2), ("trial:3", 6)]
)
def test_the_same_address_for_every_command(ebt, site, address, step):
    wanted = find_checkpoint(address, site / "runs")
    assert step_of(wanted) == step
    by_address, by_path = (ebt("evaluate", given, "--limit", 3, "--json")[1] for given in (address, wanted))
    assert {k: v for k, v in json.loads(by_address).items() if k != "seconds"} == {
        k: v for k, v in json.loads(by_path).items() if k != "seconds"
    }
    code, out, err = ebt("generate", address, "--prompt", "It", "--tokens", 3, "--json")
    assert (
        code == 0
        and json.loads(out)["tokens"]
        == json.loads(ebt("generate", wanted, "--prompt", "It", "--tokens", 3, "--json")[1])["tokens"]
    )


def test_all_of_a_run(ebt, site):
    code, out, err = ebt("evaluate", "trial:all", "--limit", 3, "--json")
    assert (
        code == 0
        and [step_of(Path(one["checkpoint"])) for one in json.loads(out)] == [2, 4, 6, 8]
        and len({one["loss"] for one in json.loads(out)}) == 4
    )
    code, out, err = ebt("generate", "trial:all")
    assert code == 2 and out == "" and "trial:all: stands for several checkpoints" in err and "trial:best" in err
    assert (
        "stands for several"
        in ebt("train", "--preset", "text/quickstart", "-p", "model.weights=trial:all", "-p", "run.name=never")[2]
    )
    assert not (site / "runs/never").exists()


@pytest.mark.parametrize(
    "address, message",
    [
        ("trial:step=5", r"no checkpoint 'step=5'; there are best, last, step=2, step=4, step=6, step=8"),
        ("trial:9", r"no checkpoint '9'"),
        ("trial:0", r"no checkpoint '0'"),
        ("trial:newest", r"no checkpoint 'newest'"),
        ("tral:best", r"tral: no such run below"),
        ("nothing.ckpt", r"no such checkpoint file"),
        ("wdb:jane/ebt", r"reads wdb:entity/project/run"),
    ],
)
def test_addresses_that_lead_nowhere(ebt, site, address, message):
    before = sorted(site.rglob("*"))
    for words in (["generate", address], ["evaluate", address], ["checkpoint", "push", address, "--to", "shelf"]):
        code, out, err = ebt(*words)
        assert code == 2 and out == "" and re.match(f"ebt: .*{message}", err) and len(err.strip().splitlines()) == 1, (
            err
        )
    assert sorted(site.rglob("*")) == before


def test_training_starts_from_a_numbered_checkpoint(ebt, site):
    code, out, err = ebt(
        "train",
        "--preset",
        "text/quickstart",
        "-p",
        "run.name=tuned",
        "-p",
        "model.weights=trial:2",
        "-p",
        "optim.peak_lr=1e-9",
        "-p",
        "trainer.max_steps=1",
        "-p",
        "trainer.val_every=1",
    )
    assert code == 0, err
    name = next(iter(read_checkpoint(find_checkpoint("trial:2", site / "runs"))["state_dict"]))
    tuned, source = (
        read_checkpoint(find_checkpoint(address, site / "runs"))["state_dict"][name] for address in ("tuned", "trial:2")
    )
    assert torch.allclose(tuned, source, atol=1e-6) and not torch.allclose(
        source, read_checkpoint(find_checkpoint("trial:4", site / "runs"))["state_dict"][name], atol=1e-6
    )


def test_a_notebook_takes_addresses(site):
    cells = [
        nbformat.v4.new_code_cell(
            'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ncheckpoint = "RUN"\nruns = "runs"',
            metadata=dict(tags=["parameters"]),
        ),
        nbformat.v4.new_code_cell(
            "from ebt_nb.config.config import build_config\nfrom ebt_nb.runs.folders import find_checkpoint\nprint(find_checkpoint(checkpoint, runs).name, build_config(preset, overrides).model.width, build_config(preset, overrides).data.batch_size)"
        ),
    ]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        ),
        site / "job.ipynb",
    )
    done = subprocess.run(
        [
            EBT,
            "run",
            "job.ipynb",
            "-p",
            "checkpoint=trial:3",
            "-p",
            f"runs={site}/runs",
            "-p",
            "data.batch_size=7",
            "--runs-dir",
            "jobs",
        ],
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "step=000006.ckpt 32 7\n" in done.stdout and "site defaults" in done.stderr, (
        done.stderr
    )  # defaults reach the notebook, -p wins


# Resuming


def final(run):
    return {name: tensor for name, tensor in read_checkpoint(run.checkpoint("last"))["state_dict"].items()}


@pytest.mark.parametrize("which", ["", ":step=4", ":1", ":best/step", "file"])
def test_resume_from_anywhere_comes_to_the_same_end(ebt, site, which):
    run, name = copy_of(site, f"copy-{re.sub('[^a-z0-9]', '', which)}"), f"copy-{re.sub('[^a-z0-9]', '', which)}"
    address = run.checkpoint("step=6") if which == "file" else f"{name}/{run.dir.name}{which}"
    code, out, err = ebt("resume", address, "--runs-dir", site / "runs")
    assert code == 0 and run.status == "done", err
    straight, again = final(find_run(f"trial/{run.dir.name}", site / "runs")), final(run)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_what_cannot_be_resumed(ebt, site):
    lone = site / "lone.ckpt"
    shutil.copy(find_checkpoint("trial:2", site / "runs"), lone)
    for address, message in [
        ("wdb:jane/ebt/trial", "ebt checkpoint pull wdb:jane/ebt/trial"),
        (lone, f"-p model.weights={lone}"),
        ("trial:7", "no checkpoint '7'"),
        ("nothing", "no such run"),
    ]:
        code, out, err = ebt("resume", address)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


# Comparing and clearing away


def test_compare_and_show_as_json(ebt, site):
    assert (
        ebt(
            "train",
            "--preset",
            "text/quickstart",
            "-p",
            "run.name=other",
            "-p",
            "optim.peak_lr=1e-4",
            "-p",
            "model.kind=transformer",
        )[0]
        == 0
    )
    code, out, err = ebt("runs", "compare", f"trial/{find_run('trial', site / 'runs').dir.name}", "other", "--json")
    found = json.loads(out)
    assert found["config"] == {
        "run.name": ["trial", "other"],
        "model.kind": ["ebt", "transformer"],
        "optim.peak_lr": [0.0048, 0.0001],
    } and all(len(values) == 2 for values in found["figures"].values())
    assert (
        found["figures"]["train/alpha"][1] is None
        and found["figures"]["val/loss"][1] == find_run("other", site / "runs").metrics[-1]["val/loss"]
    )
    shown = json.loads(ebt("runs", "show", "other", "--json")[1])
    assert (
        shown["status"] == "done"
        and len(shown["checkpoints"]) == 4
        and shown["config"]["model"]["kind"] == "transformer"
    )
    for words, message in [
        (["compare"], "say which runs"),
        (["compare", "other"], "1 run to compare"),
        (["list", "--yes"], "--yes belongs to `ebt runs clean`"),
        (["show", "trial", "other"], "shows one run"),
        (["clean", "--what", "everything"], "everything: no such rule"),
    ]:
        code, out, err = ebt("runs", *words)
        assert code == 2 and message in err, err


TRAINING = """
import sys, time
from ebt_nb.config.config import build_config
from ebt_nb.runs.folders import MetricsFile, Run
run = Run.create(build_config("text/quickstart", {"run.runs_dir": sys.argv[1], "run.name": "victim"}))
MetricsFile(run.dir / "metrics.csv").append({"step": 5, "val/loss": 7.5})
print("going", flush=True)
time.sleep(600)
"""


def test_a_run_is_cleared_away_only_when_its_process_is_gone(tmp_path):
    ebt = [EBT, "runs", "clean", "--what", "all", "--hours", "0", "--yes", "--runs-dir", tmp_path]
    job = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "going\n"
        assert (
            "nothing to clear away" in subprocess.run(ebt, capture_output=True, text=True).stdout
            and len(find_runs(tmp_path)) == 1
        )
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    assert find_runs(tmp_path)[0].status == "running"  # it could not say that it was killed
    [one] = leftovers(tmp_path, ["interrupted"], hours=0)
    assert (
        one.why == "killed at step 5 of 700, without a checkpoint"
        and leftovers(tmp_path, ["interrupted"], hours=1) == []
    )
    dry = subprocess.run([word for word in ebt if word != "--yes"], capture_output=True, text=True)
    assert "nothing was removed: --yes" in dry.stdout and len(find_runs(tmp_path)) == 1
    assert (
        "removed 1 of 1" in subprocess.run(ebt, capture_output=True, text=True).stdout
        and list(tmp_path.iterdir()) == []
    )


def test_clearing_away_keeps_last_best_and_the_newest(ebt, site):
    run = copy_of(site, "many")
    best = step_of(run.checkpoint("best"))
    code, out, err = ebt("runs", "clean", "many", "--keep", 1, "--hours", 0, "--yes")
    assert code == 0 and sorted(path.stem for path in run.dir.glob("checkpoints/*.ckpt")) == sorted(
        {"best", "last", "step=000008", f"step={best:06d}"}
    )
    assert (
        find_checkpoint("many:best", site / "runs").is_file() and len(find_checkpoints("trial:all", site / "runs")) == 4
    )
    assert json.loads(ebt("runs", "clean", "many", "--keep", 1, "--hours", 0, "--json")[1]) == []


# To other places, and back


def test_there_and_back_and_on(ebt, site, tmp_path):
    "A run goes on elsewhere from a checkpoint that was sent, to the same end."
    code, out, err = ebt("checkpoint", "push", "trial:2", "--to", tmp_path / "shelf")
    assert code == 0 and out.endswith(": sent and verified\n"), err
    [parcel] = (tmp_path / "shelf").glob("trial/*/step=000004")
    assert sorted(path.name for path in parcel.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "figures",
        "metrics.csv",
        "sha256sums",
        "status.json",
    ]
    code, out, err = ebt("checkpoint", "pull", parcel.parent, "--to", tmp_path / "runs")
    back = Run.open(out.split("run: ")[1].strip())
    assert code == 0 and back.status == "interrupted" and max(row["step"] for row in back.metrics) == 4
    assert ebt("resume", back.dir, "--runs-dir", tmp_path / "runs")[0] == 0
    straight, again = final(find_run(f"trial/{back.dir.name}", site / "runs")), final(back)
    assert back.status == "done" and all(torch.equal(straight[name], again[name]) for name in straight)
    assert ebt("evaluate", parcel, "--limit", 2)[0] == 0  # and a parcel can be used where it lies
    assert "is there already" in ebt("checkpoint", "push", "trial:2", "--to", tmp_path / "shelf")[1]
    assert "say where to with --to" in ebt("checkpoint", "push", "trial:2")[2]


@pytest.mark.skipif(not shutil.which("rsync"), reason="without rsync nothing is sent to a host")
def test_to_a_host(ebt, site, tmp_path, monkeypatch):
    "rsync at both ends of a pipe; only the shell that would carry it to another machine is left out."
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("RSYNC_RSH", str(shell))
    code, out, err = ebt("checkpoint", "push", "trial:all", "--to", f"host:{tmp_path}/far")
    assert code == 0 and out.count("sent and verified") == 4, err
    assert ebt("checkpoint", "push", "trial:all", "--to", f"host:{tmp_path}/far")[1].count("is there already") == 4
    identity = find_run("trial", site / "runs").dir.name
    code, out, err = ebt(
        "checkpoint", "pull", f"host:{tmp_path}/far/trial/{identity}:step=6", "--to", tmp_path / "runs"
    )
    assert code == 0 and [path.name for path in find_run("trial", tmp_path / "runs").checkpoints] == [
        "step=000006.ckpt"
    ]
    spoilt = tmp_path / f"far/trial/{identity}/step=000002/checkpoints/step=000002.ckpt"
    spoilt.write_bytes(b"spoilt")
    assert (
        "nothing is overwritten" in ebt("checkpoint", "push", "trial:1", "--to", f"host:{tmp_path}/far")[2]
        and spoilt.read_bytes() == b"spoilt"
    )
    assert (
        "damaged" in ebt("checkpoint", "pull", f"host:{tmp_path}/far/trial/{identity}:1", "--to", tmp_path / "other")[2]
        and not (tmp_path / "other").exists()
    )


# Weights & Biases: its answers as recorded shapes; nobody is asked where nobody sits


def recorded(site):
    "What the server answers about two runs of one name, one of which holds two versions of a checkpoint."
    run = find_run("trial", site / "runs")

    def version(number, path, aliases):
        def download(root):
            shutil.copytree(
                path.parent.parent,
                root,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(
                    "best.ckpt", "last.ckpt", *(other.name for other in run.checkpoints if other != path)
                ),
            )

        return SimpleNamespace(
            name=f"checkpoint-{run.dir.name}:v{number}",
            type="model",
            aliases=aliases,
            metadata={"step": step_of(path)},
            manifest=SimpleNamespace(entries={f"checkpoints/{path.name}": None, "config.yaml": None}),
            download=download,
        )

    versions = [
        version(n, path, [f"step={step_of(path)}"] + ["last", "latest"] * (n == 3))
        for n, path in enumerate(run.checkpoints)
        if n in (1, 3)
    ]
    runs = [
        SimpleNamespace(
            id=run.dir.name, name="trial", state="finished", logged_artifacts=lambda: versions, files=lambda: []
        ),
        SimpleNamespace(id="another", name="trial", state="crashed", logged_artifacts=lambda: [], files=lambda: []),
    ]

    def answer(path, filters=None, order="+created_at"):
        wanted = {value for one in (filters or {}).get("$or", []) for value in one.values()}
        return [one for one in runs if not wanted or {one.id, one.name} & wanted]

    return SimpleNamespace(runs=answer), run


def test_a_run_on_the_server(ebt, site, monkeypatch):
    api, run = recorded(site)
    monkeypatch.setattr(wandb_runs, "server", lambda: api)
    code, out, err = ebt("evaluate", f"wdb:jane/ebt/{run.dir.name}:step=4", "--limit", 3, "--json")
    here = json.loads(ebt("evaluate", "trial:step=4", "--limit", 3, "--json")[1])
    assert code == 0 and json.loads(out)["loss"] == here["loss"], err
    cached = site / f"runs/.wdb/jane/ebt/{run.dir.name}/checkpoint-{run.dir.name}-v1/checkpoints/step=000004.ckpt"
    assert cached.is_file() and all(".wdb" not in one.dir.parts for one in find_runs(site / "runs"))
    code, out, err = ebt("generate", "wdb:jane/ebt/trial")
    assert code == 2 and "2 runs go by this name; say which: " in err and "another (trial, crashed)" in err
    for address, message in [
        ("wdb:jane/ebt/another", "holds no checkpoint; `ebt checkpoint push"),
        (f"wdb:jane/ebt/{run.dir.name}:step=6", "there are step=4"),
        ("wdb:jane/ebt/gone", "no run has this id or name"),
    ]:
        assert message in ebt("generate", address)[2]


ASKING = """
import sys
from types import SimpleNamespace
from ebt_nb.runs import wandb_runs
runs = [SimpleNamespace(id=id, name="trial", state="finished") for id in ("first", "second")]
wandb_runs.server = lambda: SimpleNamespace(runs=lambda *_, **__: runs)
print("picked", wandb_runs.run_at(wandb_runs.server(), wandb_runs.WandbAddress("jane/ebt", "trial")).id)
"""


def test_on_a_terminal_one_is_asked():
    outer, inner = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", ASKING], stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    said = b""
    while b"which (1 to 2" not in said:
        said += os.read(outer, 1000)
    os.write(outer, b"3\n2\n")  # 3 is none: asked again
    try:
        while b"picked" not in said or not said.endswith(b"\n"):
            said += os.read(outer, 1000)
    except OSError:
        said += b"\n"  # the process has closed its end
    process.wait(timeout=30)
    os.close(outer)
    assert said.count(b"which (1 to 2") == 2 and b"1: first (trial, finished)" in said and b"picked second" in said


def test_without_a_login(site):
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_API_KEY"} | {
        "HOME": str(site),
        "NETRC": str(site / "none"),
    }
    done = subprocess.run(
        [EBT, "generate", "wdb:jane/ebt/trial"],
        cwd=site,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "wandb login" in done.stderr and "Traceback" not in done.stderr


# Site-wide defaults


def test_order_of_defaults(ebt, site, tmp_path, monkeypatch):
    run = find_run("trial", site / "runs")
    assert (
        run.config.trainer.max_steps,
        run.config.data.context,
        run.config.model.width,
        run.config.optim.peak_lr,
    ) == (8, 16, 32, 0.0048)  # site, site, site, preset
    assert run.config.run.defaults == str(site / "ebt_defaults.yaml") and run.config.data.cache_dir == site / "cache"
    assert f"site defaults were taken from {site}/ebt_defaults.yaml" in (run.dir / "console.log").read_text()
    (site / "below").mkdir(exist_ok=True)
    monkeypatch.chdir(site / "below")
    assert (
        main(["train", "--preset", "text/quickstart", "-p", "trainer.max_steps=1", "-p", f"run.runs_dir={tmp_path}"])
        == 0
    )  # found in a parent; -p wins
    [made] = find_runs(tmp_path)
    assert made.config.trainer.max_steps == 1 and made.config.model.width == 32
    other = tmp_path / "mine.yaml"
    other.write_text(
        "model: {width: 16, heads: 1, layers: 1}\ntrainer: {max_steps: 2, val_batches: 1, threads: 1}\ndata: {context: 8, batch_size: 2, max_documents: 50}\n"
    )
    assert (
        main(
            [
                "train",
                "--preset",
                "text/quickstart",
                "--defaults",
                str(other),
                "-p",
                f"run.runs_dir={tmp_path}",
                "-p",
                "run.name=named",
                "-p",
                f"data.cache_dir={site}/cache",
            ]
        )
        == 0
    )
    assert (
        load_config(find_run("named", tmp_path).dir / "config.yaml").run.defaults == str(other)
        and find_run("named", tmp_path).config.model.width == 16
    )  # one place only: the other file was not looked at
    (tmp_path / "part.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"size": "custom", "vocab_size": 2048},
                "data": {"tokenizer": "austen_2k", "batch_size": 3},
                "run": {"name": "part", "runs_dir": str(tmp_path)},
            }
        )
    )
    assert main(["train", str(tmp_path / "part.yaml")]) == 0
    part = find_run("part", tmp_path).config
    assert (part.data.batch_size, part.data.context, part.trainer.max_steps) == (3, 16, 8)


def test_runs_are_looked_for_where_the_site_keeps_them(site, tmp_path, monkeypatch, capsys):
    run = find_run("trial", site / "runs")
    (tmp_path / "ebt_defaults.yaml").write_text(f"run: {{runs_dir: {site}/runs}}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "show", f"trial/{run.dir.name}"]) == 0 and f"folder: {run.dir}\n" in capsys.readouterr().out
    assert main(["generate", f"trial/{run.dir.name}:2", "--prompt", "It", "--tokens", "2"]) == 0 and list(
        tmp_path.iterdir()
    ) == [tmp_path / "ebt_defaults.yaml"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("data: {cach_dir: x}", r"data.cach_dir: no such key \(did you mean 'data.cache_dir'\?\)"),
        ("data: {batch_size: none}", r"data.batch_size: input should be a valid integer.*'none'"),
        ("cache_dir: x", r"cache_dir: expected a section"),
    ],
)
def test_wrong_defaults_name_file_and_key(ebt, tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    for words in (
        ["train", "--preset", "text/quickstart"],
        ["overfit", "--preset", "text/quickstart"],
        ["run", "pretrain"],
    ):
        code, out, err = ebt(*words, "--defaults", tmp_path / "wrong.yaml")
        assert code == 2 and out == "" and re.match(f"ebt: {tmp_path}/wrong.yaml: {message}", err), err
    assert "cannot read" in ebt("train", "--preset", "text/quickstart", "--defaults", tmp_path / "absent.yaml")[2]


# Learning by heart, and figures


def test_overfit(ebt, site, tmp_path):
    code, out, err = ebt(
        "overfit",
        "--preset",
        "text/quickstart",
        "-p",
        "model.width=64",
        "-p",
        "optim.peak_lr=4e-3",
        "--batches",
        1,
        "--interval",
        20,
        "--updates",
        200,
        "--plot",
        tmp_path / "loss.png",
    )
    assert (
        code == 0
        and "learned by heart: loss 0.0" in out
        and "update   20  loss" in out
        and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    ), err
    code, out, err = ebt("overfit", "--preset", "text/quickstart", "--updates", 3)
    assert code == 1 and "NOT learned by heart" in err
    assert "is there already" in ebt("overfit", "--preset", "text/quickstart", "--plot", tmp_path / "loss.png")[2]
    assert "give a configuration file or --preset" in ebt("overfit")[2]


def test_figures_of_an_evaluation(ebt, site, tmp_path):
    code, out, err = ebt("evaluate", "trial:best", "--limit", 20, "--visualize", tmp_path / "figures")
    assert (
        code == 0
        and {"learning_curves.png", "losses_by_step.png", "thought.png", "landscape.png", "energy_against_surprise.png"}
        <= {path.name for path in (tmp_path / "figures").iterdir()}
        and f"figures: {tmp_path}/figures" in out
    ), err
    code, out, err = ebt("evaluate", "trial:best", "--limit", 4, "--visualize", tmp_path / "figures")
    assert code == 2 and "nothing is overwritten" in err


# Conda


def test_environment_for_conda(root, tmp_path):
    said = yaml.safe_load((root / "environment.yml").read_text())
    conda = [one for one in said["dependencies"] if isinstance(one, str)]
    [pip] = [one["pip"] for one in said["dependencies"] if isinstance(one, dict)]
    assert conda == ["python=3.11", "pip"] and pip == ["-c constraints.txt", "-e .[dev,tensorboard,sweep,images]"]
    for name in ("settings.ini", "setup.py", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "ebt_nb").mkdir()
    (tmp_path / "ebt_nb/__init__.py").touch()
    (tmp_path / "requirements.txt").write_text("\n".join(pip))  # what conda hands to pip, in the file's own folder
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-r",
            "requirements.txt",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Would install ebt_workbench" in done.stdout, done.stderr
