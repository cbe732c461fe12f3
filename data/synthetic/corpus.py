"""Write a small corpus that is shaped as ICBHI 2017 and synthetic throughout.

    python -m data.synthetic --output DIR --patients 24 --seed 0
    python -m data.synthetic --output DIR --patients 40 --seed 0 --planted-effect site
    python -m data.synthetic --output DIR --patients 40 --seed 0 --reversed-prior Meditron

Same arguments, same bytes. The folder holds recordings, annotations and the three tables under
the names of the database's own page, and two files that the database has not:
`synthetic_corpus.json` (what this is, arguments, counts, best reachable Scores, checksums) and
`synthetic_cycles.csv` (what is heard in each cycle). See docs/data.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from data.synthetic import planted
from data.synthetic.cohort import (
    MAX_PATIENTS,
    MIN_PATIENTS,
    TRAPS_FROM,
    Patient,
    Recording,
    draw_patients,
    plan_recordings,
)
from data.synthetic.sounds import NEUTRAL, PROFILES, render
from data.task import CLASSES
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import sha256

log = logging.getLogger(__name__)

MARKER = "synthetic_corpus.json"
CYCLES = "synthetic_cycles.csv"
SPLIT = "ICBHI_challenge_train_test.txt"
DEMOGRAPHICS = "ICBHI_Challenge_demographic_information.txt"
DIAGNOSIS = "ICBHI_Challenge_diagnosis.txt"
DERIVED = {"icbhi_metadata.csv"}  # made from a corpus by other commands; goes when the corpus goes
STATEMENT = "Synthetic sounds of invented patients, written by data.synthetic. No real recording."
VERSION = 2  # raise when the same arguments give other bytes


@dataclass(frozen=True)
class CorpusReport:
    """What lies in a synthetic corpus.

    Attributes:
        folder: where it lies.
        written: False when the identical corpus was already there.
        patients, recordings: numbers of them.
        seconds: total length of the recordings.
        cycles: {"train" | "test": {class name: cycles}}.
        planted_effect: the field, or None.
        best_score: with a planted effect, the best reachable ICBHI Score (0..100):
            {"rule" | "test": {"4" | "2": {"sound" | "sound_and_field" | "field": Score}}};
            "rule" follows from the rule alone, "test" from the written test part.
    """

    folder: Path
    written: bool
    patients: int
    recordings: int
    seconds: float
    cycles: dict[str, dict[str, int]]
    planted_effect: str | None
    best_score: dict | None

    def text(self) -> str:
        """What the command prints."""
        state = "written" if self.written else "already there, unchanged"
        lines = [
            f"Synthetic corpus {state}: {self.folder}",
            f"{self.patients} patients, {self.recordings} recordings, {self.seconds / 60:.1f} min",
        ]
        for part, counts in self.cycles.items():
            classes = ", ".join(f"{n} {name}" for name, n in counts.items())
            lines.append(f"{part}: {sum(counts.values())} cycles ({classes})")
        if field := self.planted_effect:
            lines += [
                f"Planted effect: the same sound means another class depending on {field}.",
                f"Best reachable ICBHI Score        without metadata  with metadata  {field} alone",
            ]
            lines += [
                f"  {n_cls} classes, {where:<18}{scores['sound']:16.1f}"
                f"{scores['sound_and_field']:15.1f}{scores['field']:{len(field) + 8}.1f}"
                for source, where in (("rule", "by the rule"), ("test", "on the test part"))
                for n_cls, scores in self.best_score[source].items()
            ]
        return "\n".join(lines)


def is_synthetic(*folders: str | Path) -> bool:
    """Whether this module wrote any of the corpora; one is a folder, or a CSV in it."""
    paths = [Path(folder) for folder in folders]
    return any(((p.parent if p.is_file() else p) / MARKER).is_file() for p in paths)


def write_corpus(
    output: str | Path,
    *,
    patients: int = 24,
    seed: int = 0,
    planted_effect: str | None = None,
    recordings_per_patient: int = 3,
    cycles_per_recording: int = 7,
    event_level: float | None = None,
    traps: bool | None = None,
    reversed_prior: str | None = None,
) -> CorpusReport:
    """Write the corpus into the folder `output`, or leave it when it is already there.

    The folder appears complete or not at all. A synthetic corpus made with other arguments is
    replaced; a folder with anything else in it is refused.

    Args:
        output: folder; absent, empty, or an earlier synthetic corpus.
        patients: 6 or more; about 60 % of them are training patients.
        seed: of everything random.
        planted_effect: None, or the field that decides what a sound means: site, device or age.
        recordings_per_patient: each at another site.
        cycles_per_recording: mean; recordings differ by up to two.
        event_level: factor on the amplitude of crackles and wheezes; None: 1, and 8 with a planted
            effect, where the question is what a sound means and not whether it can be heard.
        traps: ICBHI's irregularities (two patients in both halves, patients with two devices);
            None: where there are 20 patients or more and nothing is planted.
        reversed_prior: None, or the device whose patients are mostly abnormal in training and
            mostly normal in the test half; no device can be heard then.

    Raises:
        UserError: an argument is out of range, or the folder holds something else.
    """
    if event_level is None:
        event_level = 1 if planted_effect is None else 8
    arguments = {
        "patients": patients,
        "seed": seed,
        "planted_effect": planted_effect,
        "recordings_per_patient": recordings_per_patient,
        "cycles_per_recording": cycles_per_recording,
        "event_level": float(event_level),
        "traps": patients >= TRAPS_FROM and planted_effect is None if traps is None else traps,
    }
    if reversed_prior is not None:  # absent from the markers of all other corpora
        arguments |= {"reversed_prior": reversed_prior, "traps": bool(traps)}
    _check_arguments(arguments)
    output = Path(output)
    marker = _existing_corpus(output)
    if marker and marker["arguments"] == arguments and marker["version"] == VERSION:
        if _intact(output, marker["files"]):
            return CorpusReport(folder=output, written=False, **marker["report"])
        log.warning("%s: files are missing or changed; the corpus is written again", output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        report = _fill(draft, arguments)
        _replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return CorpusReport(folder=output, written=True, **report)


def _check_arguments(arguments: dict) -> None:
    """Raise `UserError` for what is out of range."""
    for name, low, high in (
        ("patients", MIN_PATIENTS, MAX_PATIENTS),
        ("seed", 0, 2**63 - 1),
        ("recordings_per_patient", 1, 60),
        ("cycles_per_recording", 2, 30),
        ("event_level", 0.01, 100),
    ):
        if not low <= arguments[name] <= high:
            raise UserError(f"{name} is {arguments[name]}; choose {low} <= {name} <= {high}")
    field = arguments["planted_effect"]
    if field not in (None, *planted.SECOND_GROUP):
        names = ", ".join(planted.SECOND_GROUP)
        raise UserError(f"planted_effect '{field}' cannot be planted; choose one of {names}")
    turned = arguments.get("reversed_prior")
    if turned not in (None, *PROFILES):
        raise UserError(
            f"reversed_prior '{turned}' is no device; choose one of {', '.join(PROFILES)}"
        )
    if turned and field:
        raise UserError(
            f"planted_effect '{field}' and reversed_prior '{turned}' hide each other; give one"
        )
    if field in ("site", "device") and arguments["recordings_per_patient"] < 2:
        raise UserError(
            f"planted_effect '{field}' must vary within each patient: "
            "raise recordings_per_patient to 2 or more"
        )


def _existing_corpus(output: Path) -> dict | None:
    """Marker of the synthetic corpus in `output`; None where there is nothing.

    Raises:
        UserError: there is anything else.
    """
    if output.is_file():
        raise UserError(f"{output} is a file; name a folder for the synthetic corpus")
    present = {str(p.relative_to(output)) for p in output.rglob("*") if not p.is_dir()}
    if not present:
        return None
    remedy = "name another folder for the synthetic corpus, or empty this one"
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
        own = {MARKER, *marker["files"], *DERIVED} if marker["statement"] == STATEMENT else None
    except FileNotFoundError:
        raise UserError(f"{output} holds files that are not a synthetic corpus; {remedy}") from None
    except (ValueError, TypeError, KeyError):
        own = None
    if own is None:
        raise UserError(f"{output / MARKER} does not describe a synthetic corpus; {remedy}")
    if foreign := sorted(present - own):
        names = ", ".join(foreign[:3]) + (" and more" if len(foreign) > 3 else "")
        raise UserError(f"{output} holds files that are not the corpus' own ({names}); {remedy}")
    return marker


def _intact(output: Path, files: dict[str, str]) -> bool:
    paths = {name: output / name for name in files}
    return all(p.is_file() and sha256(p) == files[name] for name, p in paths.items())


def _replace(draft: Path, output: Path) -> None:
    """Put `draft` where `output` is; an earlier corpus there is removed."""
    draft.chmod(0o755)  # mkdtemp makes it private
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
        output.replace(old)  # allowed: the target is an empty folder
        draft.replace(output)
        shutil.rmtree(old)
    else:
        draft.replace(output)


def _fill(folder: Path, arguments: dict) -> dict:
    """Write everything into `folder`; the fields of `CorpusReport` but the first two."""
    field, seed = arguments["planted_effect"], arguments["seed"]
    turned = arguments.get("reversed_prior")
    rng = np.random.default_rng([seed, 0])
    patients = draw_patients(arguments["patients"], rng, field, turned)
    recordings = plan_recordings(
        patients,
        seed=seed,
        per_patient=arguments["recordings_per_patient"],
        cycles=arguments["cycles_per_recording"],
        traps=arguments["traps"],
        field=field,
        reversed_prior=turned,
    )
    traits = {patient.pid: patient.traits for patient in patients}
    for number, recording in enumerate(recordings):
        rng = np.random.default_rng([seed, recording.pid, 1 + number])
        profile = NEUTRAL if turned or field == "device" else PROFILES[recording.device]
        sounds = np.stack([recording.heard & 1, recording.heard >> 1], axis=1).astype(bool)
        shape = (recording.bounds, sounds, recording.seconds, profile, traits[recording.pid])
        wave = render(*shape, arguments["event_level"], rng)
        subtype = str(rng.choice(list(profile.subtypes), p=list(profile.subtypes.values())))
        soundfile.write(folder / f"{recording.stem}.wav", wave, profile.rate, subtype=subtype)
        times = itertools.pairwise(recording.bounds)
        rows = [
            f"{begin:.5g}\t{end:.5g}\t{state & 1}\t{state >> 1}\n"
            for (begin, end), state in zip(times, recording.classes, strict=True)
        ]
        _write_text(folder / f"{recording.stem}.txt", "".join(rows))
    _write_tables(folder, patients, recordings)
    cycles = {}
    for part in ("train", "test"):
        classes = np.concatenate([r.classes for r in recordings if r.part == part])
        numbers = np.bincount(classes, minlength=len(CLASSES)).tolist()
        cycles[part] = dict(zip(CLASSES, numbers, strict=True))
    report = {
        "patients": len(patients),
        "recordings": len(recordings),
        "seconds": round(sum(recording.seconds for recording in recordings), 2),
        "cycles": cycles,
        "planted_effect": field,
        "best_score": None if field is None else _best_scores(recordings),
    }
    marker = {
        "statement": STATEMENT,
        "version": VERSION,
        "arguments": arguments,
        "report": report,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    return report


def _write_tables(folder: Path, patients: list[Patient], recordings: list[Recording]) -> None:
    """The three tables in the official page's form, and what is heard in each cycle."""

    def row(p: Patient) -> str:
        values = (p.pid, p.age, p.sex, p.bmi, p.weight, p.height)
        return " ".join(
            "NA" if x is None else x if isinstance(x, str) else f"{x:g}" for x in values
        )

    split = "".join(f"{recording.stem}\t{recording.part}\r\n" for recording in recordings)
    _write_text(folder / SPLIT, split)
    # The original begins with an empty line and does not end with one.
    _write_text(folder / DEMOGRAPHICS, "\r\n" + "\r\n".join(map(row, patients)))
    _write_text(folder / DIAGNOSIS, "".join(f"{p.pid}\t{p.diagnosis}\r\n" for p in patients))
    rows = [
        f"{recording.stem},{i},{heard & 1},{heard >> 1},{recording.group}\n"
        for recording in recordings
        for i, heard in enumerate(recording.heard)
    ]
    header = "Filename,CycleIndex,CracklesHeard,WheezesHeard,Group\n"
    _write_text(folder / CYCLES, header + "".join(rows))


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("ascii"))  # the same line ends on every system


def _best_scores(recordings: list[Recording]) -> dict:
    """Of the rule, with the groups as frequent as in the test part, and of the test part itself."""
    tested = [recording for recording in recordings if recording.part == "test"]
    heard, classes = (
        np.concatenate([vars(r)[key] for r in tested]) for key in ("heard", "classes")
    )
    group = np.concatenate([np.full(len(r.heard), r.group) for r in tested])
    return {
        "rule": planted.expected_scores(float(group.mean())),
        "test": planted.reachable_scores(heard, group, classes),
    }


@command
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    fields = list(planted.SECOND_GROUP)
    text = "the field that decides what a sound means (site when none is named)"
    parser.add_argument("--planted-effect", nargs="?", const="site", choices=fields, help=text)
    parser.add_argument("--recordings-per-patient", type=int, default=3)
    parser.add_argument("--cycles-per-recording", type=int, default=7)
    text = "factor on the amplitude of crackles and wheezes (1; with a planted effect 8)"
    parser.add_argument("--event-level", type=float, help=text)
    text = "ICBHI's irregularities (default: with 20 patients or more and no planted effect)"
    parser.add_argument("--traps", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "device whose prior turns round between the halves, and that cannot be heard"
    parser.add_argument("--reversed-prior", choices=list(PROFILES), help=text)
    arguments = vars(parser.parse_args(argv))
    print(write_corpus(arguments.pop("output"), **arguments).text())
