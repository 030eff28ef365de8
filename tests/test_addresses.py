"""Addresses of runs and checkpoints in every command, site-wide defaults, and checkpoints sent away and brought back.

Runs and commands are real.
"""

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

from ebt_nb.cli.main import main
from ebt_nb.config.kinds import FORMAT
from ebt_nb.config.overrides import load_config
from ebt_nb.jobs.cleanup import find_leftovers
from ebt_nb.runs import wandb_runs
from ebt_nb.runs.addresses import find_checkpoint, find_checkpoints, find_run, find_runs
from ebt_nb.runs.folders import Run, checkpoint_step
from ebt_nb.training.checkpoints import read_checkpoint

EBT = Path(sys.executable).with_name("ebt")
SITE = """
model: {layers: 1, width: 32, heads: 2}
data: {context: 16, batch_size: 4, max_documents: 50, cache_dir: cache}
trainer:
  {max_steps: 8, val_every: 4, val_batches: 2, log_every: 2, checkpoint_every: 4, keep_checkpoint_every: 2, threads: 1,
   accelerator: cpu}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with site-wide defaults for small runs, and one run of 8 updates in it, made by `ebt train`."
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
    "A function that runs a command in the site's folder and returns exit code, output and errors."
    monkeypatch.chdir(site)

    def call(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def copy_run(site, name):
    "Copy the first run, with its checkpoints, into a run that a test may change."
    [run] = [run for run in find_runs(site / "runs") if run.name == "trial" and run.dir.parent.name == "trial"]
    shutil.copytree(run.dir, site / "runs" / name / run.dir.name)
    return Run.open(site / "runs" / name / run.dir.name)


# Addresses


def test_steps_are_read_from_torch_checkpoints(site):
    run = find_run("trial", site / "runs")
    for path in run.dir.glob("checkpoints/*.ckpt"):
        assert checkpoint_step(path) == read_checkpoint(path)["global_step"]
    assert [checkpoint_step(path) for path in run.checkpoints] == [2, 4, 6, 8]
    best = min((row["val/loss"], row["step"]) for row in run.metrics if "val/loss" in row)[1]
    assert checkpoint_step(run.checkpoint("best")) == best
    assert run.checkpoint("best/step").name == f"step={best:06d}.ckpt"
    weights = [read_checkpoint(run.checkpoint(selector))["state_dict"] for selector in ("best", "best/step")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "address, step", [("trial", 8), ("trial:last", 8), ("trial:step=4", 4), ("trial:1", 2), ("trial:3", 6)]
)
def test_every_command_takes_the_same_address(ebt, site, address, step):
    path = find_checkpoint(address, site / "runs")
    assert checkpoint_step(path) == step
    results = []
    for given in (address, path):
        result = json.loads(ebt("evaluate", given, "--limit", 3, "--json")[1])
        results.append({name: value for name, value in result.items() if name != "seconds"})
    assert results[0] == results[1]
    texts = [ebt("generate", given, "--prompt", "It", "--tokens", 3, "--json") for given in (address, path)]
    assert texts[0][0] == 0
    assert json.loads(texts[0][1])["tokens"] == json.loads(texts[1][1])["tokens"]


def test_all_checkpoints_of_a_run(ebt, site):
    code, out, err = ebt("evaluate", "trial:all", "--limit", 3, "--json")
    assert code == 0
    assert [checkpoint_step(Path(one["checkpoint"])) for one in json.loads(out)] == [2, 4, 6, 8]
    assert len({one["loss"] for one in json.loads(out)}) == 4
    code, out, err = ebt("generate", "trial:all")
    assert code == 2 and out == "" and "trial:all: stands for several checkpoints" in err and "trial:best" in err
    overrides = ["-p", "model.weights=trial:all", "-p", "run.name=never"]
    assert "stands for several" in ebt("train", "--preset", "text/quickstart", *overrides)[2]
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
def test_wrong_addresses_are_refused(ebt, site, address, message):
    before = sorted(site.rglob("*"))
    for words in (["generate", address], ["evaluate", address], ["checkpoint", "push", address, "--to", "shelf"]):
        code, out, err = ebt(*words)
        assert code == 2 and out == "", err
        assert re.match(f"ebt: .*{message}", err) and len(err.strip().splitlines()) == 1, err
    assert sorted(site.rglob("*")) == before


def test_training_starts_from_a_numbered_checkpoint(ebt, site):
    settings = [
        "run.name=tuned",
        "model.weights=trial:2",
        "optim.peak_lr=1e-9",
        "trainer.max_steps=1",
        "trainer.val_every=1",
    ]
    overrides = [word for setting in settings for word in ("-p", setting)]
    code, _, err = ebt("train", "--preset", "text/quickstart", *overrides)
    assert code == 0, err
    addresses = ("tuned", "trial:2", "trial:4")
    tuned, source, later = (read_checkpoint(find_checkpoint(one, site / "runs"))["state_dict"] for one in addresses)
    name = next(iter(source))
    assert torch.allclose(tuned[name], source[name], atol=1e-6)
    assert not torch.allclose(source[name], later[name], atol=1e-6)


PARAMETERS_CELL = """
preset = "text/quickstart"
overrides = {}
run_dir = "."
checkpoint = "RUN"
runs = "runs"
"""
PRINTING_CELL = """
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.addresses import find_checkpoint
config = build_config(preset, overrides)
print(find_checkpoint(checkpoint, runs).name, config.model.width, config.data.batch_size)
"""


def test_a_notebook_takes_addresses(site):
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS_CELL, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(PRINTING_CELL),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), site / "job.ipynb")
    settings = ["checkpoint=trial:3", f"runs={site}/runs", "data.batch_size=7"]
    overrides = [word for setting in settings for word in ("-p", setting)]
    command = [EBT, "run", "job.ipynb", *overrides, "--runs-dir", "jobs"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step=000006.ckpt 32 7\n" in done.stdout  # site defaults reach the notebook, and -p overrides them
    assert "site defaults" in done.stderr


# Resuming


def assert_equal_weights(run, other):
    "The last checkpoints of two runs have the same weights, to the bit."
    weights, expected = (read_checkpoint(one.checkpoint("last"))["state_dict"] for one in (run, other))
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.parametrize("selector", ["", ":step=4", ":1", ":best/step", "file"])
def test_a_run_resumed_from_any_checkpoint_ends_the_same(ebt, site, selector):
    name = f"copy-{re.sub('[^a-z0-9]', '', selector)}"
    run = copy_run(site, name)
    address = run.checkpoint("step=6") if selector == "file" else f"{name}/{run.dir.name}{selector}"
    code, _, err = ebt("resume", address, "--runs-dir", site / "runs")
    assert code == 0 and run.status == "done", err
    assert_equal_weights(run, find_run(f"trial/{run.dir.name}", site / "runs"))


def test_checkpoints_without_a_run_here_are_not_resumed(ebt, site):
    lone = site / "lone.ckpt"
    shutil.copy(find_checkpoint("trial:2", site / "runs"), lone)
    for address, message in [
        ("wdb:jane/ebt/trial", "ebt checkpoint pull wdb:jane/ebt/trial"),
        (lone, f"-p model.weights={lone}"),
        ("trial:7", "no checkpoint '7'"),
        ("nothing", "no such run"),
    ]:
        code, _, err = ebt("resume", address)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1


# Comparing runs and removing leftovers


def test_compare_and_show_as_json(ebt, site):
    settings = ["run.name=other", "optim.peak_lr=1e-4", "model.kind=transformer"]
    overrides = [word for setting in settings for word in ("-p", setting)]
    assert ebt("train", "--preset", "text/quickstart", *overrides)[0] == 0
    first = f"trial/{find_run('trial', site / 'runs').dir.name}"
    compared = json.loads(ebt("runs", "compare", first, "other", "--json")[1])
    expected = {"run.name": ["trial", "other"], "model.kind": ["ebt", "transformer"], "optim.peak_lr": [0.0048, 0.0001]}
    assert {key: values for key, values in compared["config"].items() if None not in values} == expected
    assert compared["config"]["thinking.steps"] == [2, None]  # a key that the baseline does not have
    assert all(len(values) == 2 for values in compared["metrics"].values())
    assert compared["metrics"]["train/alpha"][1] is None
    assert compared["metrics"]["val/loss"][1] == find_run("other", site / "runs").metrics[-1]["val/loss"]
    shown = json.loads(ebt("runs", "show", "other", "--json")[1])
    assert shown["status"] == "done" and len(shown["checkpoints"]) == 4
    assert shown["config"]["model"]["kind"] == "transformer"
    for words, message in [
        (["compare"], "name runs by folders"),
        (["compare", "other"], "1 run to compare"),
        (["list", "--yes"], "--yes belongs to `ebt runs clean`"),
        (["show", "trial", "other"], "shows one run"),
        (["clean", "--what", "everything"], "everything: no such rule"),
    ]:
        code, _, err = ebt("runs", *words)
        assert code == 2 and message in err, err


TRAIN_FOREVER = """
import sys, time
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile
run = Run.create(build_config("text/quickstart", {"run.runs_dir": sys.argv[1], "run.name": "victim"}))
MetricsFile(run.dir / "metrics.csv").append({"step": 5, "val/loss": 7.5})
print("training", flush=True)
time.sleep(600)
"""


def test_a_run_is_removed_only_when_its_process_has_ended(tmp_path):
    def clean(*options):
        command = [EBT, "runs", "clean", "--what", "all", "--hours", "0", "--runs-dir", tmp_path, *options]
        return subprocess.run(command, capture_output=True, text=True).stdout

    job = subprocess.Popen([sys.executable, "-c", TRAIN_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "training\n"
        assert "nothing to remove" in clean("--yes") and len(find_runs(tmp_path)) == 1
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    assert find_runs(tmp_path)[0].status == "running"  # a killed process cannot write its status
    [leftover] = find_leftovers(tmp_path, ["interrupted"], hours=0)
    assert leftover.reason == "killed at step 5 of 700, without a checkpoint"
    assert find_leftovers(tmp_path, ["interrupted"], hours=1) == []
    assert "nothing was removed: --yes" in clean() and len(find_runs(tmp_path)) == 1
    assert "removed 1 of 1" in clean("--yes") and list(tmp_path.iterdir()) == []


def test_cleaning_keeps_the_last_best_and_newest_checkpoints(ebt, site):
    run = copy_run(site, "many")
    best = checkpoint_step(run.checkpoint("best"))
    code, _, _ = ebt("runs", "clean", "many", "--keep", 1, "--hours", 0, "--yes")
    kept = {"best", "last", "step=000008", f"step={best:06d}"}
    assert code == 0 and sorted(path.stem for path in run.dir.glob("checkpoints/*.ckpt")) == sorted(kept)
    assert find_checkpoint("many:best", site / "runs").is_file()
    assert len(find_checkpoints("trial:all", site / "runs")) == 4
    assert json.loads(ebt("runs", "clean", "many", "--keep", 1, "--hours", 0, "--json")[1]) == []


# Sending checkpoints to other places, and bringing them back


def test_a_run_is_resumed_elsewhere_from_a_checkpoint_that_was_sent(ebt, site, tmp_path):
    "It ends with the same bits as the run here."
    code, out, err = ebt("checkpoint", "push", "trial:2", "--to", tmp_path / "shelf")
    assert code == 0 and out.endswith(": sent and verified\n"), err
    [parcel] = (tmp_path / "shelf").glob("trial/*/step=000004")
    names = ["checkpoints", "config.yaml", "figures", "metrics.csv", "sha256sums", "status.json"]
    assert sorted(path.name for path in parcel.iterdir()) == names
    code, out, err = ebt("checkpoint", "pull", parcel.parent, "--to", tmp_path / "runs")
    pulled = Run.open(out.split("run: ")[1].strip())
    assert code == 0 and pulled.status == "interrupted" and max(row["step"] for row in pulled.metrics) == 4
    assert ebt("resume", pulled.dir, "--runs-dir", tmp_path / "runs")[0] == 0
    assert pulled.status == "done"
    assert_equal_weights(pulled, find_run(f"trial/{pulled.dir.name}", site / "runs"))
    assert ebt("evaluate", parcel, "--limit", 2)[0] == 0  # a parcel can also be used where it is
    assert "is there already" in ebt("checkpoint", "push", "trial:2", "--to", tmp_path / "shelf")[1]
    assert "give a target with --to" in ebt("checkpoint", "push", "trial:2")[2]


@pytest.mark.skipif(not shutil.which("rsync"), reason="without rsync nothing is sent to a host")
def test_checkpoints_are_sent_to_a_host(ebt, site, tmp_path, monkeypatch):
    "rsync runs at both ends of a pipe; only the shell that would reach another machine is replaced."
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("RSYNC_RSH", str(shell))
    target = f"host:{tmp_path}/far"
    code, out, err = ebt("checkpoint", "push", "trial:all", "--to", target)
    assert code == 0 and out.count("sent and verified") == 4, err
    assert ebt("checkpoint", "push", "trial:all", "--to", target)[1].count("is there already") == 4
    source = f"trial/{find_run('trial', site / 'runs').dir.name}"
    code, out, err = ebt("checkpoint", "pull", f"{target}/{source}:step=6", "--to", tmp_path / "runs")
    pulled = find_run("trial", tmp_path / "runs")
    assert code == 0 and [path.name for path in pulled.checkpoints] == ["step=000006.ckpt"]
    damaged = tmp_path / f"far/{source}/step=000002/checkpoints/step=000002.ckpt"
    damaged.write_bytes(b"damaged")
    assert "nothing is overwritten" in ebt("checkpoint", "push", "trial:1", "--to", target)[2]
    assert damaged.read_bytes() == b"damaged"
    assert "damaged" in ebt("checkpoint", "pull", f"{target}/{source}:1", "--to", tmp_path / "other")[2]
    assert not (tmp_path / "other").exists()


# Weights & Biases: objects of the shape of the server's answers


def make_wandb_api(site):
    "An API that knows two runs with the same name, one of which holds two versions of a checkpoint; and the local run."
    run = find_run("trial", site / "runs")

    def make_version(number, path, aliases):
        def download(root):
            others = [other.name for other in run.checkpoints if other != path]
            ignored = shutil.ignore_patterns("best.ckpt", "last.ckpt", *others)
            shutil.copytree(path.parent.parent, root, dirs_exist_ok=True, ignore=ignored)

        return SimpleNamespace(
            name=f"checkpoint-{run.dir.name}:v{number}",
            type="model",
            aliases=aliases,
            metadata={"step": checkpoint_step(path)},
            manifest=SimpleNamespace(entries={f"checkpoints/{path.name}": None, "config.yaml": None}),
            download=download,
        )

    versions = [
        make_version(n, path, [f"step={checkpoint_step(path)}"] + ["last", "latest"] * (n == 3))
        for n, path in enumerate(run.checkpoints)
        if n in (1, 3)
    ]
    runs = [
        SimpleNamespace(
            id=run.dir.name, name="trial", state="finished", logged_artifacts=lambda: versions, files=lambda: []
        ),
        SimpleNamespace(id="another", name="trial", state="crashed", logged_artifacts=lambda: [], files=lambda: []),
    ]

    def query_runs(path, filters=None, order="+created_at"):
        names = {name for condition in (filters or {}).get("$or", []) for name in condition.values()}
        return [one for one in runs if not names or {one.id, one.name} & names]

    return SimpleNamespace(runs=query_runs), run


def test_a_run_on_the_server(ebt, site, monkeypatch):
    api, run = make_wandb_api(site)
    monkeypatch.setattr(wandb_runs, "wandb_api", lambda: api)
    code, out, err = ebt("evaluate", f"wdb:jane/ebt/{run.dir.name}:step=4", "--limit", 3, "--json")
    local = json.loads(ebt("evaluate", "trial:step=4", "--limit", 3, "--json")[1])
    assert code == 0 and json.loads(out)["loss"] == local["loss"], err
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


CHOOSE_RUN = """
import sys
from types import SimpleNamespace
from ebt_nb.runs import wandb_runs
runs = [SimpleNamespace(id=id, name="trial", state="finished") for id in ("first", "second")]
api = SimpleNamespace(runs=lambda *_, **__: runs)
print("picked", wandb_runs.find_wandb_run(api, wandb_runs.WandbAddress("jane/ebt", "trial")).id)
"""


def test_a_user_at_a_terminal_chooses_one_of_several_runs():
    terminal, process_side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHOOSE_RUN], stdin=process_side, stdout=process_side, stderr=process_side
    )
    os.close(process_side)
    output = b""
    while b"which (1 to 2" not in output:
        output += os.read(terminal, 1000)
    os.write(terminal, b"3\n2\n")  # there is no third option: the question is asked again
    try:
        while b"picked" not in output or not output.endswith(b"\n"):
            output += os.read(terminal, 1000)
    except OSError:
        output += b"\n"  # the process has closed its side
    process.wait(timeout=300)
    os.close(terminal)
    assert output.count(b"which (1 to 2") == 2
    assert b"1: first (trial, finished)" in output and b"picked second" in output


def test_without_a_login_one_line_says_so(site):
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    environment |= {"HOME": str(site), "NETRC": str(site / "none")}
    done = subprocess.run(
        [EBT, "generate", "wdb:jane/ebt/trial"],
        cwd=site,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "wandb login" in done.stderr and "Traceback" not in done.stderr


# Site-wide defaults


def test_order_of_defaults(ebt, site):
    "Site-wide defaults override the preset."
    run = find_run("trial", site / "runs")
    config = run.config
    assert (config.trainer.max_steps, config.data.context, config.model.width) == (8, 16, 32)  # from the site
    assert config.optim.peak_lr == 0.0048  # from the preset
    assert config.run.defaults == str(site / "ebt_defaults.yaml") and config.data.cache_dir == site / "cache"
    assert f"site defaults were taken from {site}/ebt_defaults.yaml" in (run.dir / "console.log").read_text()


def test_defaults_are_found_in_a_parent_folder_and_overridden(site, tmp_path, monkeypatch):
    (site / "below").mkdir(exist_ok=True)
    monkeypatch.chdir(site / "below")
    overrides = ["-p", "trainer.max_steps=1", "-p", f"run.runs_dir={tmp_path}"]
    assert main(["train", "--preset", "text/quickstart", *overrides]) == 0
    [run] = find_runs(tmp_path)
    assert run.config.trainer.max_steps == 1 and run.config.model.width == 32


OTHER_DEFAULTS = """
model: {width: 16, heads: 1, layers: 1}
trainer: {max_steps: 2, val_batches: 1, threads: 1}
data: {context: 8, batch_size: 2, max_documents: 50}
"""


def test_defaults_come_from_one_file_only(site, tmp_path, monkeypatch):
    monkeypatch.chdir(site)
    other = tmp_path / "mine.yaml"
    other.write_text(OTHER_DEFAULTS)
    settings = [f"run.runs_dir={tmp_path}", "run.name=named", f"data.cache_dir={site}/cache"]
    overrides = [word for setting in settings for word in ("-p", setting)]
    assert main(["train", "--preset", "text/quickstart", "--defaults", str(other), *overrides]) == 0
    run = find_run("named", tmp_path)
    assert load_config(run.dir / "config.yaml").run.defaults == str(other) and run.config.model.width == 16


def test_a_configuration_file_overrides_defaults(site, tmp_path, monkeypatch):
    monkeypatch.chdir(site)
    sections = {
        "format": FORMAT,
        "model": {"size": "custom", "vocab_size": 2048},
        "data": {"tokenizer": "austen_2k", "batch_size": 3},
        "run": {"name": "part", "runs_dir": str(tmp_path)},
    }
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(sections))
    assert main(["train", str(tmp_path / "part.yaml")]) == 0
    config = find_run("part", tmp_path).config
    assert (config.data.batch_size, config.data.context, config.trainer.max_steps) == (3, 16, 8)


def test_runs_are_found_in_the_runs_folder_of_the_site(site, tmp_path, monkeypatch, capsys):
    run = find_run("trial", site / "runs")
    (tmp_path / "ebt_defaults.yaml").write_text(f"run: {{runs_dir: {site}/runs}}\n")
    monkeypatch.chdir(tmp_path)
    address = f"trial/{run.dir.name}"
    assert main(["runs", "show", address]) == 0 and f"folder: {run.dir}\n" in capsys.readouterr().out
    assert main(["generate", f"{address}:2", "--prompt", "It", "--tokens", "2"]) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "ebt_defaults.yaml"]


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


# Overfitting, and figures


def test_overfit(ebt, site, tmp_path):
    preset, plot = ["--preset", "text/quickstart"], ["--plot", tmp_path / "loss.png"]
    overrides = ["-p", "model.width=64", "-p", "optim.peak_lr=4e-3"]
    code, out, err = ebt("overfit", *preset, *overrides, *plot, "--batches", 1, "--interval", 20, "--updates", 200)
    assert code == 0, err
    assert "memorised: loss 0.0" in out and "update   20  loss" in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = ebt("overfit", *preset, "--updates", 3)
    assert code == 1 and "NOT memorised" in err
    assert "exists already" in ebt("overfit", *preset, *plot)[2]
    assert "give a configuration file or --preset" in ebt("overfit")[2]


def test_figures_of_an_evaluation(ebt, site, tmp_path):
    figures = ["--visualize", tmp_path / "figures"]
    code, out, err = ebt("evaluate", "trial:best", "--limit", 20, *figures)
    assert code == 0 and f"figures: {tmp_path}/figures" in out, err
    expected = ("learning_curves", "losses_by_step", "prediction_steps", "landscape", "energy_and_nll")
    assert {f"{name}.png" for name in expected} <= {path.name for path in (tmp_path / "figures").iterdir()}
    code, out, err = ebt("evaluate", "trial:best", "--limit", 4, *figures)
    assert code == 2 and "nothing is overwritten" in err


# Conda


def test_the_conda_environment_installs_the_package(root, tmp_path):
    dependencies = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    conda = [one for one in dependencies if isinstance(one, str)]
    [pip] = [one["pip"] for one in dependencies if isinstance(one, dict)]
    assert conda == ["python=3.11", "pip"]
    assert pip == ["-c constraints.txt", "-e .[dev,docs,tensorboard,sweep,images,video]"]
    for name in ("settings.ini", "setup.py", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / "ebt_nb").mkdir()
    (tmp_path / "ebt_nb/__init__.py").touch()
    (tmp_path / "requirements.txt").write_text("\n".join(pip))  # as conda passes it to pip, in the file's own folder
    options = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "-r", "requirements.txt"]
    command = [sys.executable, "-m", "pip", "install", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install ebt_workbench" in done.stdout, done.stderr
