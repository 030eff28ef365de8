"""A disk that fails at any write during training: the last checkpoint survives, and the message names the folder.

The disk is real; a shim around the calls that write raises the error. `EBT_FUZZ=1` tries every write, the suite a few.
"""

import builtins
import contextlib
import errno
import io
import os
import shutil
from pathlib import Path

import pytest
from conftest import NUM_EXAMPLES

from ebt_nb.config.errors import WorkbenchError
from ebt_nb.config.overrides import build_config, override_config
from ebt_nb.runs.addresses import find_runs
from ebt_nb.runs.files import RunError
from ebt_nb.runs.folders import Run
from ebt_nb.training.checkpoints import read_checkpoint
from ebt_nb.training.fit import fit

NUM_STEPS = 6
NUM_FAULTS = 4  # of each kind, in the suite
PATH_CALLS = ("replace", "rename", "link", "mkdir", "unlink", "open")


class FaultyDisk:
    """While entered, writes below a folder fail with an error number: the `first` one and, if it `stays`, all after it.

    A write is a call that opens a file for writing, writes or flushes it, or renames, links, removes or makes a name.

    Attributes:
        calls: what was written so far, such as `replace last.ckpt`.
    """

    def __init__(self, folder: Path, number: int = errno.EIO, first: int | None = None, stays: bool = False):
        self.folder = str(folder)
        self.number = number
        self.first = first
        self.stays = stays
        self.calls: list[str] = []
        self.patches = pytest.MonkeyPatch()

    def __enter__(self) -> "FaultyDisk":
        for name in PATH_CALLS:
            self.patches.setattr(os, name, self.wrap_path_call(name, getattr(os, name)))
        self.patches.setattr(os, "fsync", self.wrap_fsync(os.fsync))
        opened = self.wrap_open(io.open)
        self.patches.setattr(io, "open", opened)
        self.patches.setattr(builtins, "open", opened)
        return self

    def __exit__(self, *error) -> None:
        self.patches.undo()

    def count(self, call: str, path) -> None:
        "Note a call, and fail if it is its turn."
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.folder):
            return
        self.calls.append(f"{call} {Path(path).name}")
        is_due = len(self.calls) == self.first or (self.stays and self.first and len(self.calls) > self.first)
        if is_due:
            raise OSError(self.number, os.strerror(self.number), os.fspath(path))

    def wrap_path_call(self, name, function):
        def call(path, *arguments, **options):
            reads = name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not reads:
                self.count(name, path)
            return function(path, *arguments, **options)

        return call

    def wrap_fsync(self, function):
        def fsync(number):
            path = os.readlink(f"/proc/self/fd/{number}")
            self.count("fsync", path)
            return function(number)

        return fsync

    def wrap_open(self, function):
        def open(path, mode="r", *arguments, **options):
            if mode.startswith("r") and "+" not in mode:
                return function(path, mode, *arguments, **options)
            self.count("open", path)
            file = function(path, mode, *arguments, **options)
            return FaultyFile(file, self, path) if not isinstance(path, int) else file

        return open


class FaultyFile:
    "A file opened for writing on a faulty disk."

    def __init__(self, file, disk: FaultyDisk, path):
        self.file = file
        self.disk = disk
        self.path = path
        self.holds_unwritten = False

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def write(self, content):
        self.disk.count("write", self.path)
        self.holds_unwritten = True
        return self.file.write(content)

    def flush(self):
        self.disk.count("flush", self.path)
        self.holds_unwritten = False
        self.file.flush()

    def close(self):
        self.file.close()
        if self.holds_unwritten:
            self.holds_unwritten = False
            self.disk.count("close", self.path)


def test_the_disk_fails_where_it_is_told(tmp_path):
    with FaultyDisk(tmp_path, errno.ENOSPC, first=3) as disk:
        with open(tmp_path / "a", "w") as file, pytest.raises(OSError, match="No space left"):
            file.write("b")
            file.write("c")
        (tmp_path / "d").write_text("e")
    assert disk.calls == ["open a", "write a", "write a", "close a", "open d", "write d", "close d"]
    assert (tmp_path / "a").read_text() == "b" and (tmp_path / "d").read_text() == "e"


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Run:
    "A run that was trained for half of its updates."
    folder = tmp_path_factory.mktemp("half")
    settings = {
        "model.layers": 1,
        "model.width": 16,
        "model.heads": 2,
        "data.context": 16,
        "data.batch_size": 2,
        "data.max_documents": 200,
        "data.cache_dir": str(folder / "cache"),
        "run.runs_dir": str(folder / "runs"),
        "trainer.max_steps": NUM_STEPS // 2,
        "trainer.val_every": 3,
        "trainer.val_batches": 1,
        "trainer.log_every": 1,
        "trainer.checkpoint_every": 2,
        "trainer.keep_checkpoint_every": 2,
        "trainer.threads": 1,
        "trainer.accelerator": "cpu",
        "optim.warmup_steps": 1,
    }
    return fit(build_config("text/quickstart", settings), progress="none")


def resume(half: Run, folder: Path, disk: FaultyDisk | None) -> tuple[Run, str | None]:
    "Train a copy of a run to its end on a disk; return it, and the error with its notes as a user reads it."
    if not folder.exists():
        shutil.copytree(half.dir, folder)
    run = Run.open(folder)
    config = override_config(half.config, {"trainer.max_steps": NUM_STEPS})
    with disk or contextlib.nullcontext():
        try:
            fit(config, run, resume=True, progress="none")
        except WorkbenchError as error:
            return Run.open(folder), "\n".join([str(error), *getattr(error, "__notes__", [])])
    return Run.open(folder), None


def check_survivors(run: Run, min_step: int) -> None:
    "Every checkpoint can be loaded, the last one is as new as it was, and the files of the run can be read."
    run.check_files()
    assert read_checkpoint(run.checkpoint("last"))["global_step"] >= min_step
    for path in [*(run.dir / "checkpoints").glob("*.ckpt"), *run.checkpoints, run.checkpoint("best")]:
        assert all(value.isfinite().all() for value in read_checkpoint(path)["state_dict"].values())
        assert not path.name.startswith(".")


def select_calls(calls: list[str], offset: int) -> list[int]:
    "Return the numbers (from 1) of the calls to fail: of writes to one file in a row, only the first and the last."
    numbers = []
    for number, call in enumerate(calls, 1):
        is_first = number == 1 or calls[number - 2] != call
        is_last = number == len(calls) or calls[number] != call
        if is_first or is_last:
            numbers.append(number)
    return numbers if NUM_EXAMPLES else numbers[offset :: max(1, len(numbers) // NUM_FAULTS)]


FAULTS = [(errno.ENOSPC, True), (errno.EIO, False), (errno.EACCES, False), (errno.EACCES, True)]


@pytest.mark.parametrize("number, stays", FAULTS)
def test_the_last_checkpoint_survives_a_fault_at_any_write(half, tmp_path, number, stays):
    folder, counting = tmp_path / "whole", FaultyDisk(tmp_path)
    run, message = resume(half, folder, counting)
    assert message is None and run.status == "done"
    numbers = select_calls(counting.calls, FAULTS.index((number, stays)))
    for first in numbers:
        folder = tmp_path / f"fault-{first}"
        disk = FaultyDisk(folder, number, first, stays)
        run, message = resume(half, folder, disk)
        failed_call = disk.calls[first - 1]
        assert message is None or str(folder) in message, (failed_call, message)
        assert message is not None or run.status == "done", failed_call
        check_survivors(run, NUM_STEPS // 2)
        if first == numbers[-2]:  # the disk works again
            run, message = resume(half, folder, None)
            assert message is None and run.status == "done"
        shutil.rmtree(folder)


@pytest.mark.parametrize("number, stays", FAULTS)
def test_a_run_that_cannot_be_created_leaves_nothing(half, tmp_path, number, stays):
    with FaultyDisk(tmp_path) as disk:
        Run.create(half.config, tmp_path / "whole/run")
    for first in range(1, len(disk.calls) + 1):
        folder = tmp_path / f"{first}/run"
        with FaultyDisk(folder.parent, number, first, stays), pytest.raises(RunError) as error:
            Run.create(half.config, folder)
        assert str(folder) in str(error.value) and os.strerror(number) in str(error.value)
        assert find_runs(folder.parent) == []
        assert not folder.parent.exists() or stays, disk.calls[first - 1]
