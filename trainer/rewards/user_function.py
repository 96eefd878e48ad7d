"""A reward function of the user's own, named by the recipe and by nothing else."""

import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.rewards.group import Group

UserReward = Callable[[Group], Tensor]


def load_function(path: str) -> UserReward:
    """Import `package.module:function` and check that it takes one group.

    Raises:
        ValueError: it cannot be imported, is no function, or takes other arguments.
    """
    place = f"reward function {path!r}"
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{place} cannot be imported ({error}); install its package on every worker, or put "
            "the module beside the recipe's working directory"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{place}: module {module_name!r} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{place} is {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise ValueError(
            f"{place} must take one argument, a trainer.rewards.group.Group: {error}"
        ) from error
    return _checked(path, function)


def _checked(path: str, function: UserReward) -> UserReward:
    """The function, whose result must be a float [N, G] tensor."""

    def call(group: Group) -> Tensor:
        with torch.no_grad():
            result = function(group)
        if not isinstance(result, Tensor) or result.shape != group.items.shape:
            found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"reward function {path!r} returned {found}; it must return one number for each "
                f"candidate, a tensor {list(group.items.shape)}"
            )
        return result.float().masked_fill(~group.valid, 0.0)

    return call
