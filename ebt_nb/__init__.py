__version__ = "0.1.0"
__all__ = ["EBT"]


def __getattr__(name):  # imported when it is used, so that `import ebt_nb` stays cheap
    if name == "EBT":
        from ebt_nb.analysis.ebt import EBT

        return EBT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
