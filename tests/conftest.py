"""What all tests share: options, threads, fixtures, and checks of shapes and types.

jaxtyping and beartype check every annotation in the package's signatures while the tests run (`type_checks`).
"""

import gc
import os
from pathlib import Path

from ebt_nb.runs.lean_imports import import_less

import_less()

# isort: split
import pytest
from forked import Forker, fork_kernels
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

NUM_CORES = min(2, os.cpu_count() or 1)
NUM_TEST_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))

gc.set_threshold(10_000)  # rarer searches for garbage, as in `ebt` (`cli/13_main`)

# tests with drawn inputs: a few fixed examples in the suite; `EBT_FUZZ=10000` draws so many new ones
NUM_EXAMPLES = int(os.environ.get("EBT_FUZZ", 0))
settings.register_profile(
    "drawn",
    max_examples=NUM_EXAMPLES or 20,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("drawn")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        "--parity-dir",
        default=str(ROOT / "tests" / "fixtures"),
        help="folder with a manifest.json and the reference tensors it names",
    )
    parser.addoption(
        "--parity-dtype", default="float64", choices=["float64", "float32"], help="number format of the parity tests"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "agreement: notebooks, package and README say the same; these run first")
    if not config.getoption("numprocesses", None):  # else other processes run the tests, and this one imports nothing
        prepare_process()


def prepare_process():
    "Import what is large, and let the package's functions check their arguments, before any test imports it."
    import datasets  # noqa: F401  before the import hook, which compiles what is imported behind it again
    import lightning.pytorch  # noqa: F401
    import torch
    import type_checks

    torch.set_num_threads(max(1, NUM_CORES // NUM_TEST_PROCESSES))
    type_checks.install()


LONGEST_FIRST = ("test_experiments", "test_slurm", "test_launch", "test_parallel")


def pytest_collection_modifyitems(items):
    "Start with what must agree, then the files that take longest, so that test processes end at about the same time."

    def rank(item):
        if item.get_closest_marker("agreement"):
            return -1
        name = item.path.stem
        return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=rank)


class FileScheduling(LoadScopeScheduling):
    """A file is run by one test process, because its tests share fixtures; each experiment is on its own.

    Groups (`--dist loadgroup`) would say the same, but pytest-xdist 3.8 cannot mark them with pytest 9.2.
    """

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_experiments.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def forker():
    "Runs `ebt` in processes of their own that need not import anything first."
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture
def forked_kernels(forker, monkeypatch):
    "Kernels of notebooks that a test executes need not import anything first."
    from jupyter_client.provisioning import LocalProvisioner

    monkeypatch.setattr(LocalProvisioner, "launch_kernel", LocalProvisioner.launch_kernel)  # restored afterwards
    fork_kernels(forker.server)


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT
