"""The one base class of every typed setting."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen group of settings; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
