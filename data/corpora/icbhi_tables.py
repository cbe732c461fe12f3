"""Parsers of what the ICBHI 2017 database is made of: names, annotations and its three tables.

Every parser is strict about meaning (an impossible value is an error that names file, row and
remedy) and tolerant about form (byte-order mark, line ends, blank lines, Latin-1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from utils.common.errors import UserError

#: Their order is part of every checkpoint.
DEVICES: tuple[str, ...] = ("AKGC417L", "Litt3200", "LittC2SE", "Meditron")
SITES: tuple[str, ...] = ("Al", "Ar", "Ll", "Lr", "Pl", "Pr", "Tc")
MODES = ("sc", "mc")
#: s; times are given to the millisecond at best, and no recording lasts an hour (ICBHI: 86 s).
SHORTEST_CYCLE, LONGEST_RECORDING = 5e-4, 3600.0
_PID = re.compile(r"[1-9][0-9]{2,5}")
_RECORDING_INDEX = re.compile(r"[0-9]{1,3}[a-z][0-9]{1,3}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MISSING = {"", "na", "n/a", "nan"}


class RecordingName(NamedTuple):
    """The five tokens of a recording's stem, `PID_RecIdx_Site_Mode_Device`."""

    pid: int
    index: str
    site: str
    mode: str
    device: str

    @property
    def stem(self) -> str:
        return f"{self.pid}_{self.index}_{self.site}_{self.mode}_{self.device}"


class Cycle(NamedTuple):
    """One row of an annotation: a breathing cycle, times in s from the recording's start."""

    start: float
    end: float
    crackle: int
    wheeze: int


class Demographics(NamedTuple):
    """One patient; years, kg/m2, kg, cm; None where the table says nothing."""

    age: float | None
    sex: str | None
    bmi: float | None
    weight: float | None
    height: float | None


def parse_name(stem: str) -> RecordingName:
    """`101_1b1_Al_sc_Meditron` -> its tokens."""
    tokens = stem.split("_")
    if len(tokens) != 5:
        raise UserError(
            f"recording name '{stem}': {len(tokens)} tokens between underscores, 5 expected "
            "(patient_index_site_mode_device, such as 101_1b1_Al_sc_Meditron); rename the file"
        )
    pid, index, site, mode, device = tokens
    for token, good, expected in (
        (pid, _PID.fullmatch(pid), "a patient number such as 101"),
        (index, _RECORDING_INDEX.fullmatch(index), "a recording index such as 1b1"),
        (site, site in SITES, f"one of {', '.join(SITES)}"),
        (mode, mode in MODES, f"one of {', '.join(MODES)}"),
        (device, device in DEVICES, f"one of {', '.join(DEVICES)}"),
    ):
        if not good:
            raise UserError(f"recording name '{stem}': '{token}' is not {expected}; rename it")
    return RecordingName(int(pid), index, site, mode, device)


def parse_annotation(text: str, source: str) -> list[Cycle]:
    """Rows `start<TAB>end<TAB>crackle<TAB>wheeze` -> cycles, in order of time.

    Args:
        text: content of the annotation.
        source: file name for messages.
    """
    cycles: list[Cycle] = []
    for number, line in _rows(text):
        where = f"{source}, row {number}"
        cycle = _parse_cycle(line.split(), where)
        if cycles and cycle.start < cycles[-1].end:
            last = cycles[-1]
            raise UserError(
                f"{where}: starts at {cycle.start:g} s, within or before the row above "
                f"({last.start:g}..{last.end:g} s); sort the rows by time or correct them"
            )
        cycles.append(cycle)
    if not cycles:
        raise UserError(f"{source}: holds no cycle; restore the original file")
    return cycles


def _parse_cycle(fields: list[str], where: str) -> Cycle:
    remedy = "restore the original file or correct the row"
    if len(fields) != 4:
        raise UserError(
            f"{where}: {len(fields)} columns, 4 expected (start s, end s, crackle 0/1, "
            f"wheeze 0/1); {remedy}"
        )
    start = _number(fields[0], where, "start")
    end = _number(fields[1], where, "end")
    if start < 0 or end - start < SHORTEST_CYCLE or end > LONGEST_RECORDING:
        raise UserError(f"{where}: no breath is from {start:g} s to {end:g} s; {remedy}")
    for text, name in zip(fields[2:], ("crackle", "wheeze"), strict=True):
        if text not in ("0", "1"):
            raise UserError(f"{where}: {name} is '{text}', 0 or 1 expected; {remedy}")
    return Cycle(start, end, int(fields[2]), int(fields[3]))


def parse_split(text: str, source: str) -> dict[str, str]:
    """Rows `stem<TAB>train|test` -> {stem: part}."""
    parts: dict[str, str] = {}
    for number, line in _rows(text):
        where = f"{source}, row {number}"
        fields = _fields(line)
        if len(fields) != 2 or fields[1].lower() not in ("train", "test"):
            raise UserError(
                f"{where}: '{_shorten(line)}' is not a recording and train|test; restore the file"
            )
        stem = re.sub(r"\.wav$", "", fields[0], flags=re.IGNORECASE)
        try:
            parse_name(stem)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        _add(parts, stem, fields[1].lower(), where)
    return _not_empty(parts, source)


def parse_demographics(text: str, source: str) -> dict[int, Demographics]:
    """Rows `patient age sex BMI weight height` (tabs, commas or blanks) -> {patient: values}."""
    patients: dict[int, Demographics] = {}
    for where, pid, fields in _patient_rows(text, source, columns=6):
        sex = None if fields[2].lower() in _MISSING else fields[2].upper()
        if sex not in ("F", "M", None):
            raise UserError(f"{where}: sex is '{fields[2]}', F, M or NA expected; correct the row")
        row = Demographics(
            _optional(fields[1], where, "age (years)", 0, 130),
            sex,
            _optional(fields[3], where, "BMI (kg/m2)", 1, 150),
            _optional(fields[4], where, "weight (kg)", 0.1, 700),
            _optional(fields[5], where, "height (cm)", 10, 300),
        )
        _add(patients, pid, row, where)
    return _not_empty(patients, source)


def parse_diagnosis(text: str, source: str) -> dict[int, str | None]:
    """Rows `patient diagnosis` (tab, comma or blank) -> {patient: diagnosis}."""
    patients: dict[int, str | None] = {}
    for where, pid, fields in _patient_rows(text, source, columns=2):
        _add(patients, pid, None if fields[1].lower() in _MISSING else fields[1], where)
    return _not_empty(patients, source)


def _add(table: dict, key: str | int, value: object, where: str) -> None:
    if key in table:
        raise UserError(f"{where}: {key} is there twice; remove one of the rows")
    table[key] = value


def _not_empty(table: dict, source: str) -> dict:
    if not table:
        raise UserError(f"{source}: has no rows; download it again")
    return table


def _patient_rows(text: str, source: str, columns: int) -> Iterator[tuple[str, int, list[str]]]:
    """(place for messages, patient, fields) of each row; a header line is left out."""
    for position, (number, line) in enumerate(_rows(text)):
        fields = _fields(line)
        where = f"{source}, row {number}"
        if position == 0 and fields[0] and not any(c.isdigit() for c in fields[0]):
            continue  # a header, such as the mirror's "ID,CLASS"
        if len(fields) != columns:
            raise UserError(
                f"{where}: {len(fields)} columns, {columns} expected; correct the row or "
                "download the table again"
            )
        if not _PID.fullmatch(fields[0]):
            raise UserError(
                f"{where}: '{_shorten(fields[0])}' is not a patient number; correct the row"
            )
        yield where, int(fields[0]), fields


def _rows(text: str) -> Iterator[tuple[int, str]]:
    """(row number from 1, line) of the lines that are not blank."""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line.strip():
            yield number, line


def _fields(line: str) -> list[str]:
    """A row's fields: tabs and commas keep empty fields, runs of blanks do not."""
    separator = next((s for s in ("\t", ",") if s in line), None)
    return [field.strip() for field in line.strip("\r\n ").split(separator)]


def _number(text: str, where: str, name: str) -> float:
    value = float(text) if _DECIMAL.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{where}: {name} is '{_shorten(text)}', a finite number expected; correct the row"
        )
    return value


def _optional(text: str, where: str, name: str, low: float, high: float) -> float | None:
    if text.lower() in _MISSING:
        return None
    value = _number(text, where, name)
    if not low <= value <= high:
        raise UserError(
            f"{where}: {name} is {value:g}, outside {low:g}..{high:g}; correct it or write NA"
        )
    return value


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
