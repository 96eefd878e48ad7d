"""The one base class of every typed setting."""

from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

_INT64 = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=_INT64)]
"""Of what lies on storage: what 64 bits hold, as a file may say anything."""
PositiveCount = Annotated[int, Field(gt=0, le=_INT64)]
Timestamp = Annotated[float, Field(ge=0, le=253_402_300_799)]
"""Seconds since the epoch, of which a calendar knows the date."""


class Config(BaseModel):
    """A frozen group of settings; an unknown key is an error, never ignored.

    Numbers are finite, and truth is no number: `true` is refused where 1 would be taken.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _truth_is_no_number(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(data, dict):
            wrong = [name for name, value in data.items() if _is_misplaced_truth(cls, name, value)]
            if wrong:
                problem = PydanticCustomError("truth", "must be no truth value")
                raise ValidationError.from_exception_data(
                    cls.__name__,
                    [InitErrorDetails(type=problem, loc=(n,), input=data[n]) for n in wrong],
                )
        return handler(data)

    def chosen(self, *names: str) -> list[str]:
        """Those of these settings that are not as they are by default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]


def _is_misplaced_truth(block: type[Config], name: Any, value: Any) -> bool:
    if not isinstance(value, bool) or name not in block.model_fields:
        return False
    wanted = block.model_fields[name].annotation
    return wanted is not bool and wanted is not Any and bool not in get_args(wanted)
