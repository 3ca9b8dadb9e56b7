"""What all parts of the configuration share: unknown names are refused, old names still work."""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Base of all parts of a configuration.

    Unknown names are errors. A name in `renamed` is an older spelling of a setting: it still works,
    and a `FutureWarning` says what the setting is called now.
    """

    model_config = ConfigDict(extra="forbid")

    renamed: ClassVar[Mapping[str, str]] = {}
    """Older spellings of settings: old name to new name."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        return refuse_unknown(translate_names(values, cls.renamed), cls.model_fields)


def translate_names(values: Any, renamed: Mapping[str, str]) -> Any:
    """Return settings under their names of today; an older spelling is warned about.

    Raises:
        ValueError: a setting is given under both names.
    """
    if not isinstance(values, dict):
        return values
    translated = dict(values)
    for old in renamed.keys() & values.keys():
        new = renamed[old]
        if new in values:
            raise ValueError(f"{old} is the old name of {new}: give {new} alone")
        warnings.warn(f"the setting {old} is now called {new}", FutureWarning, stacklevel=2)
        translated[new] = translated.pop(old)
    return translated


def refuse_unknown(values: Any, known: Iterable[str], prefix: str = "") -> Any:
    """Return `values` as they are; raise a ValueError with "did you mean" for an unknown name."""
    known = sorted(known)
    for name in values if isinstance(values, dict | list) else ():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"unknown setting {prefix}{name}: {hint}")
    return values
