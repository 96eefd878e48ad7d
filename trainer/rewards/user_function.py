"""A reward function of the user's own, named by the recipe and by nothing else."""

import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_loaders.poison import reason_of
from trainer.rewards.group import Group

UserReward = Callable[[Group], Tensor]
ITS_OWN = (MemoryError, torch.OutOfMemoryError)
"""What the recipe's `failures` block knows better than a sentence on the function would."""


def load_function(path: str) -> UserReward:
    """Import `package.module:function` and check that it takes one group.

    Modules are found where Python finds them, and in the working directory, which Ray puts on the
    path of an embedded cluster's workers, too.

    Raises:
        ValueError: it cannot be imported, is no function, or takes other arguments.
    """
    place = f"reward function {path!r}"
    module_name, _, name = path.partition(":")
    module = _imported(place, module_name)
    if not hasattr(module, name):
        raise ValueError(f"{place}: module {module_name!r} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{place} is {type(function).__name__}, not a function")
    _check_signature(place, function)
    return _checked(place, function, getattr(module, "__file__", None))


def source_hash(path: str) -> str | None:
    """sha256 of the file of `package.module:function`'s module; None where it has none to read.

    What that module imports is not looked at.

    Raises:
        ValueError: it cannot be imported.
    """
    module = _imported(f"reward function {path!r}", path.partition(":")[0])
    try:
        file = inspect.getsourcefile(module)
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):  # built in, or compiled and shipped without its source
        return None


def _imported(place: str, module_name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:  # behind what is installed, and our own packages
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _unimportable(place, error) from error
        raise ValueError(
            f"{place} cannot be imported ({error}): install its package on every node, or, with "
            f"cluster.address=local, start tandem where the module lies (this is {here})"
        ) from error
    except (Exception, SystemExit) as error:  # a script exits when it is imported
        raise _unimportable(place, error) from error


def _unimportable(place: str, error: BaseException) -> ValueError:
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    else:
        where = _line_of(error, None)
    return ValueError(
        f"{place} cannot be imported: its module raises {reason_of(error)} ({where}); mend it there"
    )


def _check_signature(place: str, function: Callable[..., Any]) -> None:
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise ValueError(f"{place} is async, and nothing awaits it: write a plain `def`")
    if inspect.isgeneratorfunction(called):
        raise ValueError(f"{place} yields; return one number a candidate, as a tensor")
    wanted = f"{place} must take one argument, a trainer.rewards.group.Group"
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise ValueError(
            f"{wanted}, and does not tell what it takes: call it from a function of your own"
        ) from error
    try:
        signature.bind(object())
    except TypeError as error:
        raise ValueError(f"{wanted}: {error}") from error


def _checked(place: str, function: UserReward, file: str | None) -> UserReward:
    """The function, called with a copy; its result must be finite numbers, one a candidate."""

    def call(group: Group) -> Tensor:
        try:
            with torch.no_grad():
                # Training goes on with these tensors: what the function does to them is its own.
                result = function(group.clone())
        except ITS_OWN:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{place} raised {reason_of(error)} ({_line_of(error, file)}); mend it there"
            ) from error
        return _result(place, result, group)

    return call


def _result(place: str, result: object, group: Group) -> Tensor:
    wanted = f"it must return one number for each candidate, a tensor {list(group.items.shape)}"
    if not isinstance(result, Tensor) or result.shape != group.items.shape:
        found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{place} returned {found}; {wanted}")
    if result.is_complex():
        raise ValueError(f"{place} returned complex numbers; {wanted} of real ones")
    rewards = result.to(group.items.device, torch.float32).masked_fill(~group.valid, 0.0)
    wrong = (~rewards.isfinite()).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        item, user = int(group.items[row, column]), int(group.contexts.user_ids[row])
        raise ValueError(
            f"{place} returned {float(rewards[row, column])} for {len(wrong)} of "
            f"{int(group.valid.sum())} candidates, the first of which is item {item} for user "
            f"{user} (both as dense ids); return finite numbers"
        )
    return rewards


def _line_of(error: BaseException, file: str | None) -> str:
    """`file:line` of the deepest call in a file, or of the deepest of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == file]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
