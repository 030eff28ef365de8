"""Run `nbdev_test` with rarer searches for garbage and faster imports, as `ebt` does (`cli/13_main`).

What nearly all notebooks import is imported once, before the processes that run them are forked. A shell starts
background jobs with interrupts ignored; some notebooks test what an interrupt does.
"""

import gc
import signal

from nbdev.test import nbdev_test

from ebt_nb.runs.lean_imports import import_less

gc.set_threshold(10_000)
import_less()

# isort: split
import datasets  # noqa: F401
import lightning.pytorch  # noqa: F401
import matplotlib.pyplot  # noqa: F401

signal.signal(signal.SIGINT, signal.default_int_handler)
nbdev_test()
