"""Checks of shapes and types at every call of the package's functions, by beartype and jaxtyping.

jaxtyping's own decorator checks parameters twice, binds every call to a signature, and compiles two functions for each
definition, which for a function within a function is each call of the outer one. A small training run takes three to
ten times as long with it. The decorator below checks the same annotations, each once.
"""

import functools
import inspect
import threading
import types
from typing import ForwardRef, Literal, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, install_import_hook, jaxtyped

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is annotated is fine
checked_definitions = {}  # code of a function within a function -> its checks, which call what `Targets` holds


class Targets(threading.local):
    "Functions whose parameters are being checked, the innermost last."

    def __init__(self):
        self.functions = []


targets = Targets()


def mentions_array(annotation) -> bool:
    "Return whether an annotation has named axes, as `Float[Tensor, ...]` or a type made of such."
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(mentions_array, getattr(annotation, "__args__", ())))


def is_resolvable(annotation, names: dict) -> bool:
    "Return whether all texts in an annotation, as in list['Run'], are names that are defined."
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            eval(annotation, names)
        except NameError:
            return False
        return True
    if get_origin(annotation) is Literal:
        return True
    return all(is_resolvable(part, names) for part in getattr(annotation, "__args__", ()))


def keep_resolvable(function) -> dict:
    """Remove the annotations that cannot be checked, and return the others; texts become what they name.

    Such are names that a module imports only for readers of types, or defines later.
    """
    names, annotations = function.__globals__, {}
    for name, annotation in function.__annotations__.items():
        if is_resolvable(annotation, names):
            annotations[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
    function.__annotations__ = annotations
    return annotations


def share_axes(checked, function):
    "Let the axes of all parameters and of the result have one meaning in each call."

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jaxtyped("context"):
            return checked(*args, **kwargs)

    return call


def check_definition(function):
    "Return a function within a function with the checks that its first definition was given."
    if function.__code__ not in checked_definitions:

        @functools.wraps(function)
        def call_target(*args, **kwargs):
            return targets.functions.pop()(*args, **kwargs)

        checked_definitions[function.__code__] = check_types(call_target)
    checked = checked_definitions[function.__code__]

    @functools.wraps(function)
    def call(*args, **kwargs):
        depth = len(targets.functions)
        targets.functions.append(function)
        try:
            return checked(*args, **kwargs)
        finally:
            del targets.functions[depth:]  # still there if a parameter was refused

    return call


def check_calls(function=None, *, typechecker):
    "Check parameters and result of a function; the import hook decorates all functions and classes with this."
    if function is None:
        return functools.partial(check_calls, typechecker=typechecker)
    if not isinstance(function, types.FunctionType):
        return jaxtyped(function, typechecker=typechecker)
    annotations = keep_resolvable(function)
    if not annotations:
        return function
    through_target = "<locals>" in function.__qualname__ or inspect.isgeneratorfunction(function)
    checked = check_definition(function) if through_target else check_types(function)
    return share_axes(checked, function) if any(map(mentions_array, annotations.values())) else checked


def install() -> None:
    "Check what is imported from the package from now on."
    jaxtyping.jaxtyped = check_calls  # the decorator that the hook writes into modules
    install_import_hook("ebt_nb", "type_checks.check_types")
