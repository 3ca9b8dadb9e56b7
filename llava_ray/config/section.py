"""The base of all configuration sections: unknown names are errors, renamed settings still work."""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base class of all configuration sections.

    Unknown names are errors. `renamed` lists old names of settings: an old name still works, and a
    `FutureWarning` gives the new one.
    """

    model_config = ConfigDict(extra="forbid")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name of a setting -> its new name."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        return refuse_unknown(translate_names(values, cls.renamed), cls.model_fields)


def translate_names(values: Any, renamed: Mapping[str, str]) -> Any:
    """Return the settings under their current names, with a warning for each old name.

    Raises:
        ValueError: a setting is given under both its names.
    """
    if not isinstance(values, dict):
        return values
    translated = dict(values)
    for old in renamed.keys() & values.keys():
        new = renamed[old]
        if new in values:
            raise ValueError(f"{old} is the old name of {new}: give only {new}")
        warnings.warn(f"the setting {old} is now called {new}", FutureWarning, stacklevel=2)
        translated[new] = translated.pop(old)
    return translated


def refuse_unknown(values: Any, known: Iterable[str], prefix: str = "") -> Any:
    """Return `values` unchanged.

    Raises:
        ValueError: a name is not among `known`; the message suggests the closest one.
    """
    known = sorted(known)
    for name in values if isinstance(values, dict | list) else ():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown setting {prefix}{name}: {hint}")
    return values
