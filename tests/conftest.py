"Shared by all tests: options, threads, and jaxtyping's run-time checks of every shape and type in the package's signatures."

import os
from pathlib import Path

import pytest
import torch
from forked import Forker
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is fine
checking = install_import_hook("ebt_nb", "conftest.checked")  # before anything imports the package

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
    config.addinivalue_line(
        "markers", "agreement: notebooks, package and README say the same; tests/run.sh runs these first"
    )


@pytest.fixture(scope="session")
def forker():
    "Runs `ebt` in processes of their own that need not import anything first."
    made = Forker()
    yield made
    made.close()


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT
