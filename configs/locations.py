"""Settings that name a place: a path or URL of a file, a directory, or another run's output."""

from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from configs import storage


class _IsLocation:
    """Marks a setting's type."""


Location = Annotated[str, _IsLocation]
"""A path or any fsspec URL. A relative path is one below the directory that tandem starts in."""

_C = TypeVar("_C", bound=BaseModel)


def absolute_locations(config: _C) -> _C:
    """A copy of a block in which no location, at any depth, depends on where it is read."""
    fields = type(config).model_fields
    return config.model_copy(
        update={
            name: _absolute(value)
            if isinstance(value, str) and _is_location(fields[name])
            else _with_absolute(value)
            for name, value in config
        }
    )


def _absolute(url: str) -> str:
    remote = "://" in url and not url.startswith(("file://", "local://"))
    return url if remote else storage.absolute(url)  # of a store this machine may have no driver


def _with_absolute(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return absolute_locations(value)
    if isinstance(value, list | tuple):
        return type(value)(_with_absolute(element) for element in value)
    if isinstance(value, dict):
        return {key: _with_absolute(element) for key, element in value.items()}
    return value


def _is_location(field: FieldInfo) -> bool:
    marks = [*field.metadata]
    for choice in get_args(field.annotation):  # of `Location | None`
        marks += getattr(choice, "__metadata__", ())
    return _IsLocation in marks
