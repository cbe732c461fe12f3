"""What a user says of recordings without a corpus: which files, their cycles, their metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile

from data.corpora.icbhi_tables import parse_annotation
from data.corpora.manifest import NUMBERS, Where, read_rows, to_number
from data.segments import Segment
from utils.common.errors import UserError
from utils.common.readers import read_text

#: Of files in a folder; a file that is named is tried whatever its name.
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw", ".mat4"}
SUFFIXES |= {".aif", ".aifc", ".oga", ".opus"}
#: Metadata of a recording that a user may know, in addition to `NUMBERS`.
NAMES = ("device", "site")


def find_audio(paths: Sequence[str | Path]) -> list[Path]:
    """The named files, and those with an audio suffix in the named folders and below, in order.

    Raises:
        UserError: a folder without audio.
    """
    found = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
            if not inside:
                raise UserError(f"{path}: no recording found there or below; name a file")
        found += inside
    return list(dict.fromkeys(found))


def read_annotation(path: str | Path) -> list[Segment]:
    """Cycles of an ICBHI annotation (.txt: start, end, crackle, wheeze)."""
    text = read_text(path, "restore the original file", fallback="latin-1")
    return [Segment(*cycle) for cycle in parse_annotation(text, str(path))]


class Table:
    """A CSV about recordings: rows without a `file` are about the only recording there is.

    A file is named by its path from the CSV's folder, its name, or its name without suffix.
    """

    def __init__(self, path: str | Path, required: Sequence[str], optional: Sequence[str]):
        self.path, self.where = Path(path), Where(Path(path))
        if not self.path.is_file():
            raise UserError(f"no table {path}; correct the name")
        self.rows = read_rows(self.path, required, [n for n in optional if n not in required])
        for name in {"start", "end", *NUMBERS} & set(self.rows):
            to_number(self.rows, self.where, name, needed=name in required)
        names = self.rows["file"]
        self.paths = names.map(lambda name: name and str((self.path.parent / name).resolve()))

    def of(self, recording: Path, alone: bool) -> pd.DataFrame:
        """The rows of a recording; alone: it is the only one."""
        files = self.rows["file"]
        same = files.isin([recording.name, recording.stem])
        same |= self.paths == str(recording.resolve())
        return self.rows[same | ((files == "") & alone)]


class Cycles(Table):
    """CSV of cycles: start, end (s), and if there are several recordings, file; crackle and wheeze
    (0 or 1) where they are known."""

    def __init__(self, path: str | Path):
        super().__init__(path, ("start", "end"), ("file", "crackle", "wheeze"))
        for name in ("crackle", "wheeze"):
            bad = ~self.rows[name].isin(["0", "1", ""])
            self.where.refuse(bad, f"{name} is neither 0 nor 1 nor empty")

    def cycles(self, recording: Path, alone: bool) -> list[Segment]:
        """Cycles of a recording, in the order of the rows.

        Raises:
            UserError: there is none.
        """
        rows = self.of(recording, alone)
        if rows.empty:
            raise UserError(f"{self.path} has no cycle of {recording}; add rows with its file name")
        labels = [
            (None, None) if "" in pair else tuple(map(int, pair))
            for pair in zip(rows["crackle"], rows["wheeze"], strict=True)
        ]
        return [Segment(a, b, *label) for a, b, label in zip(rows["start"], rows["end"], labels,
                                                             strict=True)]  # fmt: skip


class MetadataTable(Table):
    """CSV of metadata: file, and any of device, site, age (years), bmi (kg/m2); empty: unknown."""

    def __init__(self, path: str | Path):
        super().__init__(path, ("file",), (*NAMES, *NUMBERS))

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place for messages, what is known) of each row."""
        for number, row in enumerate(self.rows.to_dict("records")):
            yield f"{self.where}, row {number + 2}", self._known(row)

    def names(self, recording: Path) -> bool:
        """Whether any row is about the recording."""
        return not self.of(recording, alone=False).empty

    def metadata(self, recording: Path) -> dict[str, Any]:
        """What the last row of a recording says; nothing where it has none."""
        rows = self.of(recording, alone=False).to_dict("records")
        return self._known(rows[-1]) if rows else {}

    @staticmethod
    def _known(row: dict[str, Any]) -> dict[str, Any]:
        given = {name: row[name] for name in (*NAMES, *NUMBERS)}
        return {k: v for k, v in given.items() if v != "" and v == v}  # NaN: an empty number
