"""Where the cells of a grid stand, and what the rest of it will take, by what lies on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.common.lock import owner_of
from utils.runs.cells import Cell, Grid
from utils.runs.processes import STOPPED, described, read_ending
from utils.training.pace import Pace, device_name

STATES = ("finished", "running", "preempted", "failed", "pending")


@dataclass(frozen=True)
class State:
    """One of `STATES`, with what belongs to it: Score, owner, how far it came, last line."""

    name: str
    detail: str = ""
    time: float = 0.0  # of a failure, s since 1970


def state_of(grid: Grid, cell: Cell) -> State:
    """Where a cell stands. A killed one counts as preempted: the same command resumes it."""
    owner, ending = owner_of(cell.folder.path), read_ending(grid.log(cell))
    if cell.folder.finished:  # asked last: an owner that has gone since has finished it
        return State("finished", cell.score())
    if owner:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        return State("running", f"{who} since {owner.get('since', 'a moment ago')}")
    if ending and ending["status"] not in STOPPED:
        last = f"{described(ending['status'])}: {ending['last']}"
        return State("failed", last, ending["time"])
    if ending or cell.folder.config.is_file():
        epochs = len(cell.folder.read_metrics())
        return State("preempted", f"after {epochs} of {cell.config.training.epochs} epochs")
    return State("pending")


def show_states(grid: Grid, jobs: dict[str, str] | None = None) -> str:
    """One line per cell, then how many there are of each state.

    Args:
        jobs: run name -> state of its Slurm job.
    """
    lines, counts = [], Counter()
    for position, cell in enumerate(grid.cells, start=1):
        state = state_of(grid, cell)
        counts[state.name] += 1
        job = (jobs or {}).get(cell.folder.path.name)
        detail = "; ".join(filter(None, (state.detail, job and f"job {job}")))
        lines.append(f"[{position}/{len(grid.cells)}] {state.name:9} {cell.label}  {detail}")
    lines.append(", ".join(f"{counts[name]} {name}" for name in STATES if counts[name]))
    return "\n".join(map(str.rstrip, lines))


# -------------------------------------------------------------------- estimates


def estimates(cells: Sequence[Cell], device: str) -> list[tuple[float, float, int, bool] | None]:
    """(s of the whole cell, s left of it, bytes, measured on itself) of each; None: not measured.

    A cell is judged by its own pace on this device; else by that of a cell with the same variant
    and methods; else by the first that was measured.
    """
    paces = [(c, p) for c in cells if (p := Pace.of(c.folder)) and p.device == device]
    found: list[Any] = []
    for cell in cells:
        own = [p for c, p in paces if c is cell]
        like = [p for c, p in paces if c.config.title == cell.config.title]
        pace = next(iter([*own, *like, *(p for _, p in paces)]), None)
        if pace is None:
            found.append(None)
            continue
        epochs = cell.config.training.epochs
        left = 0 if cell.folder.finished else max(epochs - len(cell.folder.read_metrics()), 0)
        found.append((epochs * pace.epoch, left * pace.epoch, pace.memory, bool(own)))
    return found


def show_list(grid: Grid, workers: int = 1) -> str:
    """One line per cell with its state, expected time and memory; then the total."""
    device = device_name(grid.cells[0].config.training.device)
    found = estimates(grid.cells, device)
    lines = []
    for position, (cell, estimate) in enumerate(zip(grid.cells, found, strict=True), start=1):
        expected = "not measured"
        if estimate:
            whole, _, memory, own = estimate
            expected = f"{'' if own else '~'}{duration(whole)}, {memory / 1e9:.1f} GB"
        state = state_of(grid, cell).name
        lines.append(f"[{position}/{len(grid.cells)}] {state:9} {expected:22} {cell.label}")
    lines.append(f"expected on this device ({device}), epochs only, without early stopping:")
    if any(estimate is None for estimate in found):
        lines.append("  not measured: no cell has trained here for a minute or an epoch yet")
    else:
        whole, left = (sum(estimate[i] for estimate in found) for i in (0, 1))
        text = f"  {duration(whole)} in all, {duration(left)} of it left"
        text += f", {duration(left / workers)} with {workers} workers" if workers > 1 else ""
        lines.append(text + "; ~: by another cell's measurement")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
