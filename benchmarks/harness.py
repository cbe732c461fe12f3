"""What all benchmarks share: interleaved rounds, medians, spread, ratios, a last line of JSON.

Contestants take turns, so that a busy machine slows all of them equally; ratios are taken round by
round. Rounds are kept as `torch.utils.benchmark.Measurement`, whose timer waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch.utils.benchmark import Measurement, timer
from torch.utils.benchmark.utils.common import TaskSpec


class Rounds(NamedTuple):
    """Seconds of one contestant's rounds by the clock, and processor seconds of all its threads,
    which other programs on the same cores change less."""

    clock: Measurement
    processor: Measurement

    def faster(self, other: Rounds) -> Measurement:
        """How many times faster this is than `other`, round by round."""
        pairs = zip(self.clock.times, other.clock.times, strict=True)
        return measurement(b / a for a, b in pairs)


def measurement(values: Iterable[float]) -> Measurement:
    """Any values, so that they have `median`, `mean` and `iqr`."""
    return Measurement(1, list(values), TaskSpec(stmt="", setup=""))


def spread(values: Measurement) -> float:
    """Interquartile range over the median."""
    return values.iqr / values.median


def interleave(
    contestants: dict[str, Callable[[], Any]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, Rounds]:
    """Time the contestants in turn, `rounds` times each after `warmup` untimed rounds.

    A contestant that gives a float back has timed itself: these are its seconds.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, function in contestants.items():
            start, processor = timer(), time.process_time()
            own = function()
            seconds = timer() - start  # waits for the GPU before the processor's clock is read
            if number >= warmup:
                processor = time.process_time() - processor
                times[name].append((own if isinstance(own, float) else seconds, processor))
    columns = {name: zip(*rows, strict=True) for name, rows in times.items()}
    return {name: Rounds(*map(measurement, column)) for name, column in columns.items()}


def options(description: str, **defaults: Any) -> argparse.Namespace:
    """The command line: one option per keyword, of its default's type; a list has the choices."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in defaults.items():
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, list):
            kind = {"nargs": "+", "choices": default}
        elif default is False:
            kind = {"action": "store_true"}
        parser.add_argument(f"--{name}", default=default, **kind)
    return parser.parse_args()


def rounded(value: Any) -> Any:
    """The same with 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; the columns are all keys that any row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        cells = (row.get(column, "") for column in columns)
        shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def print_result(result: dict[str, Any]) -> None:
    """Print a result line by line, and as JSON in the last line."""
    for key, value in rounded(result).items():
        print(f"{key:32} {value}")
    print(json.dumps(rounded(result)))
