"Run `nbdev_test` with rarer searches for garbage, as `ebt` does (`cli/13_main`)."

import gc

from nbdev.test import nbdev_test

gc.set_threshold(10_000)
nbdev_test()
