"""What every part of the configuration has in common: unknown names are refused, with a guess."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all parts of a configuration: unknown names are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        return refuse_unknown(values, cls.model_fields)


def refuse_unknown(values: Any, known: Iterable[str], prefix: str = "") -> Any:
    """Return `values` as they are; raise a ValueError with "did you mean" for an unknown name."""
    known = sorted(known)
    for name in values if isinstance(values, dict | list) else ():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"unknown setting {prefix}{name}: {hint}")
    return values
