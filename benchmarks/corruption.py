"""Damage every file that a run or a cache reads, repeat the command, and see what it makes of it.

    python -m benchmarks.corruption [--cells 0] [--seed 0] [--output benchmarks/results]

A small SoftFiLM run is brought to a moment: `start` (its caches are ready), `resume` (killed in the
middle of training), `end` (finished) or `assembly` (the seeds of a group are finished, the group is
not). One file is damaged in one way and the same command is repeated. The outcome is

    identical   status 0, and everything it wrote equals what the undamaged command wrote
    refused     status 2 and one sentence
    WRONG       status 0 and anything else
    crash       any other end

`WRONG` and `crash` make the exit status 1. --cells N takes N random cells of the matrix.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import options, table
from benchmarks.kill_resume import Commands, fingerprint
from utils.common.errors import UserError
from utils.common.files import write_text

DEMOGRAPHICS = "ICBHI_Challenge_demographic_information.txt"
SPLIT = "ICBHI_challenge_train_test.txt"
#: Command -> words on top of kill_resume's; `frozen` reads stored features, no waveform.
KINDS = {
    "plain": (),
    "frozen": (
        *("augment.enabled=false", "backbone.trainable_blocks=1"),
        "models.ast_softfilm.conditioned_layers=[1]",
    ),
    "group": (),
}
#: (command, moment) -> patterns of files below the working folder; the first match is damaged.
FILES = {
    ("plain", "start"): [f"cache/waveforms-*/{n}" for n in ("samples.f32", "cycles.i64")]
    + ["cache/waveforms-*/index.json"],
    ("frozen", "start"): ["cache/frozen-*.features", "cache/frozen-*.crc32"],
    ("frozen", "resume"): ["cache/frozen-*.features", "cache/frozen-*.crc32"],
    ("plain", "resume"): [
        *("cache/waveforms-*/samples.f32", "runs/*/checkpoints/last.pt", "runs/*/config.yaml"),
        *("runs/*/record.json", "runs/*/metrics.csv", "runs/*/tracking.json"),
        *("corpus/1*.wav", "corpus/1*.txt", f"corpus/{SPLIT}", f"corpus/{DEMOGRAPHICS}"),
    ],
    ("plain", "end"): [
        *("runs/*/checkpoints/best.pt", "runs/*/config.yaml", "runs/*/record.json"),
        *("runs/*/metrics.csv", "runs/*/tracking.json", "runs/*/report.json", "runs/*/SHA256SUMS"),
        *("runs/*/predictions/test.csv", "runs/published/softfilm_best.pt"),
        *("corpus/1*.wav", "corpus/1*.txt", f"corpus/{SPLIT}", f"corpus/{DEMOGRAPHICS}"),
    ],
    ("group", "assembly"): [f"runs/*-s1-*/{n}" for n in ("report.json", "predictions/test.csv")]
    + ["runs/*-s1-*/checkpoints/best.pt"],
}
MAY_BE_LEFT = ("record.json", "tracking.json")  # hold no result of the run


def _changed(content: bytes, change: Callable[[bytearray], None]) -> bytes:
    changed = bytearray(content)
    change(changed)
    return bytes(changed)


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 4


def _zero(content: bytearray) -> None:
    start = len(content) // 3
    content[start : start + 512] = bytes(len(content[start : start + 512]))


#: Way -> new content from the old one and from the same file of another run; None: no file.
WAYS: dict[str, Callable[[bytes, bytes | None], bytes | None]] = {
    "deleted": lambda old, other: None,
    "empty": lambda old, other: b"",
    "truncated": lambda old, other: old[: 2 * len(old) // 3],
    "bit flipped": lambda old, other: _changed(old, _flip),
    "zeroed block": lambda old, other: _changed(old, _zero),
    "other type": lambda old, other: b'["not", "this"]\n',
    "other run's": lambda old, other: other,
}


class Cell(NamedTuple):
    """One cell of the matrix; `pattern` finds the file."""

    kind: str
    moment: str
    pattern: str
    way: str


def cells() -> Iterator[Cell]:
    """The whole matrix."""
    for (kind, moment), patterns in FILES.items():
        for pattern in patterns:
            for way in WAYS:
                yield Cell(kind, moment, pattern, way)


class Matrix:
    """Runs at every moment, kept as copies; a cell starts from a copy of its moment.

    Args:
        folder: for everything; the commands work in `folder/work`, whatever the cell.
    """

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "work"
        self.commands = Commands(self.work)
        self.whole: dict[str, dict[str, str]] = {}
        self.moments: set[tuple[str, str]] = set()

    def run(self, kind: str, *words: str) -> tuple[int, str]:
        """Repeat a command in the working folder: its status and what it printed."""
        output = self.folder / "printed.txt"
        process = self.commands.start(
            "group" if kind == "group" else "plain",
            self.work / "runs",
            *(*KINDS[kind], *words),
            output=str(output),
        )
        process.join(600)
        process.kill()
        process.join()  # else a command that took too long has no status
        return process.exitcode, output.read_text(errors="replace")

    def prepare(self, kind: str) -> None:
        """Bring a command to each of its moments; and another run's files for comparison."""
        self._empty()
        self._finish(kind, "training.seed=7", "dataset.val_seed=7")
        self._keep("other", kind)
        self._empty()
        self._finish(kind)
        self.whole[kind] = fingerprint(self.work / "runs")
        self._keep(kind, "end")
        if kind == "group":
            for path in (self.work / "runs").glob("*-group-*"):
                shutil.rmtree(path)
            self._keep(kind, "assembly")
        shutil.rmtree(self.work / "runs")
        self._keep(kind, "start")
        if (kind, "resume") in FILES:
            self._kill_in_training(kind)
            self._keep(kind, "resume")

    def _empty(self) -> None:
        for name in ("runs", "cache"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _finish(self, kind: str, *words: str) -> None:
        status, printed = self.run(kind, *words)
        if status:
            raise RuntimeError(f"the undamaged {kind} command ended with {status}: {printed}")

    def _kill_in_training(self, kind: str) -> None:
        """Kill the command once two epochs are finished and saved."""
        process = self.commands.start("plain", self.work / "runs", *KINDS[kind])
        while process.is_alive():
            lines = [p.read_text().count("\n") for p in self.work.glob("runs/*/metrics.csv")]
            if lines and lines[0] >= 3 and any(self.work.glob("runs/*/checkpoints/last.pt")):
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        if any(self.work.glob("runs/*/report.json")):
            raise RuntimeError("the command was finished before it could be killed")

    def _keep(self, kind: str, moment: str) -> None:
        shutil.copytree(self.work, self.folder / f"{kind}-{moment}")

    def outcome(self, cell: Cell) -> tuple[str, str]:
        """(identical | refused | WRONG | crash, what was printed last or what differs)."""
        if cell.kind not in self.whole:
            self.prepare(cell.kind)
        shutil.rmtree(self.work)
        shutil.copytree(self.folder / f"{cell.kind}-{cell.moment}", self.work)
        path = sorted(self.work.glob(cell.pattern))[0]
        others = sorted((self.folder / f"other-{cell.kind}").glob(cell.pattern))
        if "corpus" in cell.pattern:  # another patient's file, or the table with its rows reversed
            others = sorted(self.work.glob(cell.pattern))[-1:]
        new = WAYS[cell.way](path.read_bytes(), others[0].read_bytes() if others else None)
        if cell.way == "other run's" and new == path.read_bytes():
            new = b"".join(reversed(new.splitlines(keepends=True)))
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        status, printed = self.run(cell.kind)
        last = (printed.strip().splitlines() or [""])[-1]
        if status == 2 and "Traceback" not in printed and "error: " in printed:
            return "refused", printed[printed.rindex("error: ") :].strip()
        if status:
            return "crash", f"status {status}: {last}"
        try:
            found, whole = fingerprint(self.work / "runs"), self.whole[cell.kind]
        except UserError as error:  # of the published copy, which the command leaves as it is
            return "refused", f"when it is opened: {error}"
        names = {n for n in {**found, **whole} if not n.endswith(MAY_BE_LEFT)}
        wrong = sorted(n for n in names if found.get(n) != whole.get(n))
        return ("WRONG", ", ".join(wrong)) if wrong else ("identical", "")


def measure(chosen: list[Cell], folder: Path) -> Iterator[dict[Cell, tuple[str, str]]]:
    """Outcomes so far, after each cell; prints as it proceeds."""
    matrix, found = Matrix(folder), {}
    for number, cell in enumerate(chosen, start=1):
        found[cell] = matrix.outcome(cell)
        text = f"\r{number} of {len(chosen)}: {cell.moment}, {cell.pattern}, {cell.way}"
        print(f"{text:100}", end="", file=sys.stderr, flush=True)
        yield found


def page(found: dict[Cell, tuple[str, str]], command: str, total: int, seconds: float) -> str:
    """The matrix in Markdown, what was wrong below; total: cells that were to be measured."""
    counts = Counter(outcome for outcome, _ in found.values())
    rows: dict[str, dict[str, Any]] = {}
    for cell, (outcome, _) in found.items():
        name = f"{cell.moment}: {Path(cell.pattern).name} ({cell.kind})"
        rows.setdefault(name, {})[cell.way] = outcome
    text = f"# Damaged files, {date.today()}\n\n`{command}`, {seconds:.0f} s. "
    text += ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    text += f" of {len(found)} cells"
    text += f", where it was stopped; there are {total}" if len(found) < total else ""
    text += f".\n\n{table(rows)}\n"
    bad = [f"- {tuple(c)}: {o} {t}\n" for c, (o, t) in found.items() if o in ("WRONG", "crash")]
    return text + "".join(["\n", *bad] if bad else [])


def main() -> int:
    """Measure, print, and write the results where that is asked for."""
    args = options(__doc__, cells=0, seed=0, output="")
    chosen, began = list(cells()), time.monotonic()
    if args.cells:
        chosen = sorted(random.Random(args.seed).sample(chosen, args.cells))
    words = [f"--cells {args.cells}", f"--seed {args.seed}"] if args.cells else []
    command = " ".join(["python -m benchmarks.corruption", *words])
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(chosen, Path(folder)):
            text = page(found, command, len(chosen), time.monotonic() - began)
            if args.output:
                write_text(Path(args.output, "corruption.md"), text)
    counts = Counter(outcome for outcome, _ in found.values())
    print(f"\n{text}\n{json.dumps(counts)}")
    return int(bool(counts["WRONG"] + counts["crash"]))


if __name__ == "__main__":
    sys.exit(main())
