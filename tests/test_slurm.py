"""Jobs on a real Slurm of two nodes, started on this machine: arrays, chains, several nodes, failures and cancelling, as a user meets them.

A job waits more than it works: in a queue, for its imports, for its turn. So all tests are begun together, each in a thread with a folder of its own, and then asked one after the other what came of them."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "slurm"))
from cluster import Cluster, missing  # noqa: E402
from test_job_scripts import SMALL  # noqa: E402
from test_processes import config as two_processes  # noqa: E402

from ebt_nb.cli.main import main  # noqa: E402
from ebt_nb.runs.folders import Run, find_runs, read_status  # noqa: E402
from ebt_nb.training.fit import fit  # noqa: E402
from ebt_nb.training.base import read_checkpoint  # noqa: E402

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
EBT, ROOT = Path(sys.executable).with_name("ebt"), Path(__file__).parents[1]
PARAMETERS = 'preset = "text/quickstart"\noverrides = {}\nrun_dir = "."\ngreeting = "hello"\ntimes = 2'
TRAINS = """
from pathlib import Path
from ebt_nb.config.config import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.training.fit import fit
config = build_config(preset, overrides)
run = fit(config, Run.create(config, dir=Path(run_dir) / "ebt"), progress="none")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Scene:
    "What a test works with: the cluster and a folder."

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder

    def submit(self, *words, code: int = 0):
        "`ebt submit`: the job's number and folder; with a `code`, exit code and message instead."
        done = subprocess.run(
            [EBT, "submit", *map(str, words)],
            env=self.cluster.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        return (
            done.stderr
            if code
            else (done.stdout.strip(), Path(re.search(r"^(/.*)/job\.slurm", done.stderr, re.MULTILINE)[1]))
        )

    def write(self, name: str, *parts: str) -> Path:
        "A job: a notebook of the given cells, or a bash script of the given lines."
        path = self.folder / name
        if path.suffix != ".ipynb":
            path.write_text("\n".join(["#!/usr/bin/env bash", *parts]) + "\n")
        else:
            first = nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"]))
            nbformat.write(
                nbformat.v4.new_notebook(
                    cells=[first, *map(nbformat.v4.new_code_cell, parts)],
                    metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
                ),
                path,
            )
        return path


SCENES, AT_ONCE = {}, 4


def with_the_others(scene):
    "A test that is begun in a thread with all others of this file that were asked for. What it returns is called afterwards in the main thread: training here, to compare, wants to be alone."
    SCENES[scene.__name__] = scene

    def test(begun):
        if then := begun[scene.__name__].result():
            then()

    test.__name__, test.__doc__ = scene.__name__, scene.__doc__
    return test


@pytest.fixture(scope="module")
def begun(cluster, tmp_path_factory, request):
    asked = [
        name
        for item in request.session.items
        if (name := getattr(item, "originalname", "")) in SCENES and item.module.__name__ == __name__
    ]
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {
        name: pool.submit(SCENES[name], cluster, Scene(cluster, tmp_path_factory.mktemp(name)))
        for name in reversed(asked)
    }  # the longest stand last
    pool.shutdown(cancel_futures=True)


def output(job):
    return Path(job["StdOut"]).read_text()


@with_the_others
def test_array_of_a_notebook(cluster, scene):
    "Three tasks, each with its own values, folder and report; what the header, the configuration and the command line said has reached Slurm."
    number, folder = scene.submit(
        scene.write("greet.ipynb", "print(*[greeting] * times)"),
        "--cluster",
        "local_cpu",
        "--array",
        "times=1,2,3",
        "greeting=good day",
        "-p",
        "run.name=greetings",
        "--sbatch",
        "time=00:05:00",
        "--runs-dir",
        scene.folder / "runs",
    )
    jobs = {job["ArrayTaskId"]: job for job in cluster.ended(number)}
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}, [output(job) for job in jobs.values()]
    assert jobs.keys() == {"0", "1", "2"} and {
        (job["JobName"], job["TimeLimit"], job["NumNodes"]) for job in jobs.values()
    } == {("greetings-4xs", "00:05:00", "1")}
    assert (folder / "array.tsv").read_text() == "task\ttimes\tgreeting\n" + "".join(
        f"{i}\t{i + 1}\tgood day\n" for i in range(3)
    )
    assert (
        json.loads((folder / "slurm.json").read_text())["job"] == number
        and folder.parent == scene.folder / "runs/greetings"
    )
    for index in range(3):
        task = folder / f"task-{index}"
        said = " ".join(["good day"] * (index + 1))
        assert (
            read_status(task)["status"] == "done"
            and f"\n{said}\n" in f"\n{(task / 'console.log').read_text()}"
            and said in output(jobs[str(index)])
        )
        assert any(said in str(cell.get("outputs")) for cell in nbformat.read(task / "report.ipynb", 4).cells)


@with_the_others
def test_chain(cluster, scene):
    "What comes after starts when the first has succeeded, and is cancelled when it has failed."
    first, _ = scene.submit(scene.write("first.sh", "sleep 2", "echo done > first"), "--cluster", "local_cpu")
    second, _ = scene.submit(scene.write("second.sh", "cp first second"), "--cluster", "local_cpu", "--after", first)
    failing, folder = scene.submit(scene.write("failing.sh", "sleep 1", "exit 3"), "--cluster", "local_cpu")
    never, _ = scene.submit(scene.write("never.sh", "touch never"), "--cluster", "local_cpu", "--after", folder)
    [one], [two], [three], [four] = (cluster.ended(number) for number in (first, second, failing, never))
    assert (
        (one["JobState"], two["JobState"]) == ("COMPLETED", "COMPLETED")
        and two["StartTime"] >= one["EndTime"]
        and (scene.folder / "second").read_text() == "done\n"
    )
    assert (three["JobState"], three["ExitCode"], four["JobState"]) == ("FAILED", "3:0", "CANCELLED") and not (
        scene.folder / "never"
    ).exists()


@with_the_others
def test_two_nodes_are_one(cluster, scene):
    "Trained by srun on two nodes, a rank each: the same figures and weights as one process with both halves of the batch, so every update used the mean of the ranks' gradients."
    (scene.folder / "both.yaml").write_text(
        two_processes(scene.folder, 2, **{"trainer.devices": 1, "trainer.nodes": 2}).to_yaml()
    )
    script = scene.write("train.sh", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", f'exec srun {EBT} train "$@"')
    number, _ = scene.submit(script, "--cluster", "local_cpu", "--", "both.yaml")
    [job] = cluster.ended(number)
    assert (job["JobState"], job["NodeList"], job["NumTasks"]) == ("COMPLETED", "n[1-2]", "2"), output(job)
    [both] = find_runs(scene.folder / "runs")
    assert (
        both.status == "done"
        and "4 sequences x 16 tokens x 2 accumulated x 2 processes = 16 sequences"
        in (both.dir / "console.log").read_text()
    )

    def compared_with_one_process():
        alone = fit(two_processes(scene.folder, 1), progress="none")
        for ours, theirs in zip(both.metrics, alone.metrics, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"tokens_per_second"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
        for a, b in zip(
            read_checkpoint(both.checkpoint())["state_dict"].values(),
            read_checkpoint(alone.checkpoint())["state_dict"].values(),
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    return compared_with_one_process


@with_the_others
def test_a_job_that_fails(cluster, scene):
    "Slurm knows that it failed, and its folder holds the report with the error."
    number, folder = scene.submit(
        scene.write("fails.ipynb", "print('so far so good')", "1 / 0"),
        "--cluster",
        "local_cpu",
        "--runs-dir",
        scene.folder / "runs",
    )
    assert read_status(folder)["status"] in ("queued", "running")
    [job] = cluster.ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert (
        read_status(folder)["status"] == "failed"
        and "ZeroDivisionError" in (folder / "report.ipynb").read_text()
        and "so far so good" in (folder / "report.html").read_text()
    )
    assert "ZeroDivisionError" in output(job) and f"{folder}/report.html" in output(job)


@with_the_others
def test_what_slurm_refuses(cluster, scene):
    "Its words are shown; the script stays."
    said = scene.submit(
        scene.write("greet.ipynb", "print(greeting)"),
        "--cluster",
        "local_cpu",
        "--sbatch",
        "partition=moon",
        "--runs-dir",
        scene.folder / "runs",
        code=2,
    )
    [script] = (scene.folder / "runs").rglob("job.slurm")
    assert (
        f"{script}: Slurm refused it" in said
        and "partition" in said
        and "--partition=moon" in script.read_text()
        and read_status(script.parent)["status"] == "failed"
    )


@with_the_others
def test_cancelled_and_gone_on_with(cluster, scene):
    "scancel leaves a run with its last update saved, and a report; `ebt train --resume` goes on with it."
    long = [
        word
        for key, value in {
            **SMALL,
            "trainer.max_steps": 1_000_000,
            "trainer.log_every": 2,
            "trainer.val_every": 1_000_000,
            "data.cache_dir": scene.folder / "cache",
        }.items()
        for word in ("-p", f"{key}={value}")
    ]
    number, folder = scene.submit(
        scene.write("trains.ipynb", TRAINS), "--cluster", "local_cpu", *long, "--runs-dir", scene.folder / "runs"
    )
    cluster.until(
        lambda: (folder / "ebt/metrics.csv").is_file() and len(Run.open(folder / "ebt").metrics) > 2,
        "training does not begin",
        150,
    )
    cluster.call("scancel", number)
    [job] = cluster.ended(number)
    run = Run.open(folder / "ebt")
    cluster.until(lambda: read_status(folder)["status"] != "running", "the job does not end", 60)
    assert job["JobState"] == "CANCELLED" and job["Restarts"] == "0"
    assert (
        run.status == "interrupted"
        and read_status(folder)["status"] == "interrupted"
        and (folder / "report.html").is_file()
    )
    step = read_checkpoint(run.checkpoint())["global_step"]
    assert step == read_status(run.dir)["step"] >= run.metrics[-1]["step"] > 2

    def gone_on_with():
        assert main(["train", "--resume", str(run.dir), "-p", f"trainer.max_steps={step + 3}"]) == 0
        assert run.status == "done" and read_checkpoint(run.checkpoint())["global_step"] == step + 3

    return gone_on_with


@with_the_others
def test_job_scripts_with_sbatch(cluster, scene):
    "The same files that bash runs: sent with plain sbatch (on two nodes), and with `ebt submit` from another folder."
    if Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv/.set-up").is_file():
        pytest.skip("these tests do not run in the .venv that setup.sh made")
    words = [
        word
        for key, value in {
            **SMALL,
            "run.runs_dir": scene.folder / "runs",
            "data.cache_dir": scene.folder / "cache",
        }.items()
        for word in ("-p", f"{key}={value}")
    ]
    pretrain = ROOT / "job_scripts/nlp/pretrain"
    nodes = cluster.call(
        "sbatch",
        "--parsable",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",
        pretrain / "ebt_s1_mn.sh",
        *words,
        cwd=scene.folder,
    ).strip()
    sent, folder = scene.submit(
        pretrain / "baseline_transformer.sh", "--cluster", "local_cpu", "--array", "run.seed=1", *words
    )
    jobs = [job for number in (nodes, sent) for job in cluster.ended(number)]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}, [
        output(job) for job in jobs if job["JobState"] != "COMPLETED"
    ]
    assert "x 2 processes" in output(jobs[0]) and folder.parent == scene.folder / "runs/baseline_transformer"
    assert sorted((run.name, run.config.run.seed, run.status) for run in find_runs(scene.folder / "runs")) == [
        ("text/ebt_s1", 33, "done"),
        ("text/transformer", 1, "done"),
    ]


@with_the_others
def test_warned_queued_again_and_gone_on_with(cluster, scene):
    """A job that is warned in time saves, has itself queued again, and goes on where it was: told nothing, to the same bits.

    The command is the same both times; the second finds the run of its job by itself."""
    config = two_processes(
        scene.folder, 1, **{"trainer.max_steps": 40, "trainer.val_every": 20, "trainer.checkpoint_every": 50}
    )
    (scene.folder / "config.yaml").write_text(config.to_yaml())
    number, _ = scene.submit(
        scene.write("train.sh", f"exec {EBT} train config.yaml"), "--cluster", "local_cpu", "--sbatch", "requeue"
    )
    cluster.until(
        lambda: [run for run in find_runs(scene.folder / "runs") if len(run.metrics) > 2],
        "training does not begin",
        150,
    )
    [run] = find_runs(scene.folder / "runs")
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    cluster.until(lambda: run.status != "running", "training does not stop", 60)
    [job] = cluster.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(job)
    lines = (run.dir / "console.log").read_text()
    assert (
        "SIGUSR1: stopping" in lines
        and "resumed at step" in lines
        and run.status == "done"
        and len(find_runs(scene.folder / "runs")) == 1
    )

    def told_nothing_to_the_same_bits():
        alone = fit(config, progress="none")
        for ours, theirs in zip(run.metrics, alone.metrics, strict=True):
            assert ours | {"tokens_per_second": 0} == theirs | {"tokens_per_second": 0}
        for a, b in zip(
            read_checkpoint(run.checkpoint())["state_dict"].values(),
            read_checkpoint(alone.checkpoint())["state_dict"].values(),
        ):
            assert torch.equal(a, b)

    return told_nothing_to_the_same_bits


@with_the_others
def test_an_array_of_agents_one_of_which_has_to_make_room(cluster, scene):
    "Two jobs share a sweep; one is told to go, saves its trial, is queued again, and goes on with it."
    pytest.importorskip("optuna")
    from ebt_nb.jobs.sweep import results

    config = {
        **SMALL,
        "run.runs_dir": str(scene.folder / "runs"),
        "data.cache_dir": str(scene.folder / "cache"),
        "trainer.max_steps": 200,
        "trainer.val_every": 50,
        "trainer.log_every": 1,
    }
    command = [
        "${env}",
        "${program}",
        "train",
        "--preset",
        "text/quickstart",
        *(f"{key}={value}" for key, value in config.items()),
        "${args_no_hyphens}",
    ]
    (scene.folder / "sweep.yaml").write_text(
        yaml.safe_dump(
            {
                "program": "ebt",
                "command": command,
                "method": "grid",
                "metric": {"name": "val/loss"},
                "parameters": {"tracking.project": {"values": ["disturbed", "alone"]}},
            }
        )
    )
    number = cluster.call(
        "sbatch",
        "--parsable",
        "--requeue",
        "--array=1-2",
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--wrap=exec {EBT} sweep sweep.yaml --dir shared",
        cwd=scene.folder,
    ).strip()
    cluster.until(
        lambda: all((scene.folder / f"shared/trial-000{n}/metrics.csv").exists() for n in (0, 1)),
        "the trials do not begin",
        150,
    )
    told = next(
        job for job in cluster.jobs(number) if job["JobId"] == number
    )  # the task that has the array's own number
    cluster.call("scancel", "--batch", "--signal=USR1", f"{number}_{told['ArrayTaskId']}")
    jobs = cluster.ended(number)
    assert {job["JobState"] for job in jobs} == {"COMPLETED"} and {
        job["ArrayTaskId"]: job["Restarts"] for job in jobs
    } == {"1": "0", "2": "0", told["ArrayTaskId"]: "1"}, [output(job) for job in jobs]
    first, other, again = sorted(
        results(scene.folder / "shared"), key=lambda trial: (trial.retry_of is not None, trial.state != "failed")
    )
    assert (
        (first.state, other.state, again.state, again.retry_of) == ("failed", "done", "done", first.number)
        and "interrupted" in first.error
        and again.run == first.run
    )
    assert again.history == other.history and len(other.history) == 4


LISTENS = """
import sys, time
from pathlib import Path
from ebt_nb.runs.preemption import Interrupted, requeue, restarted, stoppable
if restarted(): raise SystemExit(Path("went-on").touch())
try:
    with stoppable():
        Path("listens").touch()
        time.sleep(600)
except Interrupted as told: print(told.signal, requeue(), flush=True)
"""


@with_the_others
def test_a_job_that_runs_out_of_time_is_queued_again(cluster, scene):
    "Neither its header nor its script says anything of a warning; `ebt submit` sees to it. Slurm is told that its time ends sooner, so that nobody has to wait for it."
    (scene.folder / "bare.slurm").write_text("#!/usr/bin/env bash\n#SBATCH --nodes=1\n#SBATCH --time=01:00:00\n")
    (scene.folder / "listens.py").write_text(LISTENS)
    number, folder = scene.submit(scene.write("job.sh", f"exec {sys.executable} listens.py"), "--cluster", "bare.slurm")
    assert (
        "#SBATCH --signal=B:USR1@120\n" in (folder / "job.slurm").read_text()
        and "#SBATCH --requeue\n" in (folder / "job.slurm").read_text()
    )
    cluster.until(lambda: (scene.folder / "listens").exists(), "the job does not begin", 60)
    cluster.call("scontrol", "update", f"JobId={number}", "EndTime=now+100")
    [job] = cluster.ended(number)
    assert (
        (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
        and (scene.folder / "went-on").exists()
        and "SIGUSR1" in output(job)
        and "queued again" in output(job)
    ), output(job)


LAUNCHES = TRAINS.replace(
    "from ebt_nb.runs.folders import Run\nfrom ebt_nb.training.fit import fit",
    "from ebt_nb.jobs.launch import launch\nfrom ebt_nb.jobs.parallel import run_in",
).replace(
    'run = fit(config, Run.create(config, dir=Path(run_dir) / "ebt"), progress="none")',
    'run = launch(config, run_in(Path(run_dir) / "ebt", config), resume=True, progress="plain")',
)


@with_the_others
def test_a_notebook_on_two_nodes_is_queued_again(cluster, scene):
    "A notebook whose `launch` starts ranks by srun on the nodes of its job: Slurm's warning reaches the ranks only, the notebook's report is saved, and the second start goes on in the same folder."
    config = two_processes(
        scene.folder,
        2,
        **{
            "trainer.devices": 1,
            "trainer.nodes": 2,
            "trainer.max_steps": 60,
            "trainer.val_every": 30,
            "trainer.checkpoint_every": 50,
        },
    ).model_dump(mode="json")
    words = [
        word
        for section, key in [
            ("model", "layers"),
            ("model", "width"),
            ("model", "heads"),
            *(("data", key) for key in ("context", "batch_size", "max_documents", "cache_dir")),
            *(
                ("trainer", key)
                for key in ("nodes", "accelerator", "threads", "max_steps", "val_every", "val_batches", "log_every")
            ),
        ]
        for word in ("-p", f"{section}.{key}={config[section][key]}")
    ]
    number, folder = scene.submit(
        scene.write("launches.ipynb", LAUNCHES),
        "--cluster",
        "local_cpu",
        *words,
        "--sbatch",
        "requeue",
        "--sbatch",
        "nodes=2",
        "--sbatch",
        "ntasks-per-node=1",
        "--runs-dir",
        scene.folder / "runs",
    )
    cluster.until(
        lambda: (folder / "ebt/metrics.csv").is_file() and len(Run.open(folder / "ebt").metrics) > 2,
        "training does not begin",
        150,
    )
    cluster.call("scancel", "--signal=USR1", number)
    [job] = cluster.ended(number)
    run = Run.open(folder / "ebt")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(job)
    assert (
        run.status == read_status(folder)["status"] == "done"
        and (folder / "report-1.ipynb").is_file()
        and "x 2 processes" in (folder / "console.log").read_text()
    )
    assert re.search(r"resumed at step \d+", (run.dir / "console.log").read_text()) and [
        row["step"] for row in run.metrics if "train/loss" in row
    ] == list(range(2, 61, 2))
