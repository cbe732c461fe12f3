"""Keys of the configuration: default, range and choices in one line, checked in one place.

A section is a dataclass whose fields are made by `setting`; it imports nothing heavy.
"""

from __future__ import annotations

import copy
import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.common.errors import UserError

MAX_SEED = 2**32 - 1  # the range that every generator takes
MAX_COUNT = 1_000_000  # of epochs, masks, workers: beyond it a value is a slip
MAX_SIZE = 65_536  # of a layer, a batch or a spectrogram


@dataclass(frozen=True)
class Limits:
    """Values that a key may have.

    Attributes:
        low, high: bounds; None: unbounded. Of every element where the value is a list.
        ends: as intervals are written: "[" and "]" include a bound, "(" and ")" exclude it.
        choices: the only values, of every element where the value is a list; empty: any.
        interval: the value is a list [low, high] with low <= high.
        hint: said after the choices.
        path: a leading `~` means the home directory.
    """

    low: float | None = None
    high: float | None = None
    ends: str = "[]"
    choices: tuple = ()
    interval: bool = False
    hint: str = ""
    path: bool = False

    def problem(self, value: Any) -> str:
        """Why `value` is refused; empty when it is not."""
        listed = value if isinstance(value, list) else [value]
        if self.choices and any(one not in self.choices for one in listed):
            word = "each must" if isinstance(value, list) else "it must"
            return f"{word} be one of {', '.join(map(str, self.choices))}{self.hint}"
        numbers = value if isinstance(value, list) else [value]
        numbers = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool)]
        if not all(math.isfinite(x) for x in numbers):
            return "it must be finite"
        if value == "":
            return "it is empty; give a value, or leave the key out"
        if self.interval and (len(numbers) != 2 or numbers[0] > numbers[1]):
            return "it must be [low, high] with low <= high"
        if any(self._outside(x) for x in numbers):
            words = []
            if self.low is not None:
                words.append(f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}")
            if self.high is not None:
                words.append(f"{'at most' if self.ends[1] == ']' else 'below'} {self.high}")
            return f"{'each must' if isinstance(value, list) else 'it must'} be {', '.join(words)}"
        return ""

    def _outside(self, x: float) -> bool:
        low, high = self.low, self.high
        below = low is not None and (x < low or (x == low and self.ends[0] == "("))
        return below or (high is not None and (x > high or (x == high and self.ends[1] == ")")))


def setting(default: Any = MISSING, **limits: Any) -> Any:
    """Dataclass field with `Limits`; a list or dictionary as default is copied per object."""
    metadata = {"limits": Limits(**limits)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse(key: str, value: Any, remedy: str) -> None:
    """Raise the `UserError` about a key's value."""
    raise UserError(f"{key}={value} cannot be: {remedy}")


def check_section(section: Any, prefix: str) -> None:
    """Refuse the first value that is outside its key's limits; expand `~` in paths.

    Raises:
        UserError: names `prefix`.key, the value and what is allowed.
    """
    for one in fields(section):
        value = getattr(section, one.name)
        limits = one.metadata.get("limits", Limits())
        problem = "" if value is None else limits.problem(value)
        if problem:
            refuse(f"{prefix}.{one.name}", value, problem)
        if limits.path and str(value).startswith("~"):
            try:
                setattr(section, one.name, str(Path(value).expanduser()))
            except RuntimeError:
                refuse(f"{prefix}.{one.name}", value, "that home directory is not known here")
