"""The invented patients and recordings of the synthetic corpus: everything but the sound.

Shaped as ICBHI 2017: patient numbers from 101, about 60 % of the patients in the training half,
one device per patient, devices, sites, ages and diagnoses as frequent as there, cycles with
median length about 2.5 s, values missing here and there. What is *heard* in the cycles is dealt
so that within each patient, and there within each group of the planted field, the heard states
come as close to their shares as whole cycles allow: every patient has nearly every class, and
the field is independent of the sound in this very corpus and not only on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.corpora.icbhi import SITES
from data.synthetic import planted
from data.synthetic.sounds import PROFILES, Traits, draw_traits
from data.task import CLASSES

FIRST_PID = 101
MIN_PATIENTS, MAX_PATIENTS = 6, 899
TRAIN_SHARE = 0.6  # of the patients
CHILD_SHARE = 0.4  # of the patients
TRAPS_FROM = 20  # patients; smaller corpora have no room for them
#: Patients per device: cycles are about as frequent as in ICBHI 2017, LittC2SE only in training.
DEVICE_SHARES = {
    "train": {"AKGC417L": 0.55, "LittC2SE": 0.17, "Meditron": 0.24, "Litt3200": 0.04},
    "test": {"AKGC417L": 0.55, "LittC2SE": 0.0, "Meditron": 0.22, "Litt3200": 0.23},
}
#: Sites by their share of ICBHI's cycles.
SITE_SHARES = dict(zip(SITES, (0.179, 0.185, 0.088, 0.119, 0.151, 0.145, 0.133), strict=True))
#: Recordings of one session stay below the number of sites in either group of the planted field.
SESSION = 6
#: Diagnosis -> (share of adults, share of children, factors on the heard states of PLAIN_MIX).
DIAGNOSES = {
    "COPD": (0.82, 0.0, (0.9, 1.2, 1.0, 1.1)),
    "Healthy": (0.06, 0.36, (1.6, 0.5, 0.5, 0.4)),
    "URTI": (0.02, 0.28, (1.3, 0.8, 0.7, 0.7)),
    "Bronchiectasis": (0.04, 0.08, (0.7, 1.5, 0.9, 1.2)),
    "Bronchiolitis": (0.0, 0.14, (0.8, 0.9, 1.6, 1.2)),
    "Pneumonia": (0.04, 0.08, (0.8, 1.6, 0.7, 1.0)),
    "LRTI": (0.01, 0.03, (0.9, 1.2, 1.1, 1.0)),
    "Asthma": (0.01, 0.03, (0.8, 0.6, 1.9, 0.8)),
}


@dataclass(frozen=True)
class Patient:
    """One row of the demographics and diagnosis tables; None is missing (years, kg/m2, kg, cm)."""

    pid: int
    part: str
    device: str
    age: float | None
    sex: str | None
    bmi: float | None
    weight: float | None
    height: float | None
    diagnosis: str
    traits: Traits
    first_group: int  # of the patient's first recording; the groups alternate from there


@dataclass(frozen=True)
class Recording:
    """One recording to be written.

    Attributes:
        stem: file name without extension.
        part: train | test.
        group: 0 | 1, of the planted field; of the site where nothing is planted.
        bounds: [n + 1] s, as the annotation prints them.
        heard: [n] 0..3, crackles + 2 * wheezes in the sound.
        classes: [n] 0..3, as annotated.
        seconds: length of the file.
    """

    pid: int
    stem: str
    part: str
    site: str
    device: str
    group: int
    bounds: np.ndarray
    heard: np.ndarray
    classes: np.ndarray
    seconds: float


def apportion(n: int, shares: dict[str, float]) -> list[str]:
    """`n` names by largest remainder; each name with a share gets one while there is room."""
    names = [name for name, share in shares.items() if share > 0]
    exact = {name: n * shares[name] / sum(shares.values()) for name in names}
    counts = {name: int(exact[name]) for name in names}
    for name in sorted(names, key=lambda name: counts[name] - exact[name]):
        counts[name] += sum(counts.values()) < n
    for name in names:
        largest = max(counts, key=counts.__getitem__)
        if counts[name] == 0 and counts[largest] > 1:
            counts[name], counts[largest] = 1, counts[largest] - 1
    return [name for name in names for _ in range(counts[name])]


def _demographics(rng: np.random.Generator, child: bool) -> tuple:
    """(age, BMI, weight, height); adults have a BMI, children weight and height."""
    if child:
        age = round(float(rng.uniform(0.3, 3)), 2) if rng.random() < 0.4 else rng.integers(3, 17)
        height = round(float(70 + 6.2 * age + 3 * rng.standard_normal()))
        weight = round(float((15.5 + 0.3 * age + rng.standard_normal()) * (height / 100) ** 2), 1)
        return float(age), None, weight, float(height)
    age = float(np.clip(round(rng.normal(67, 11)), 20, 93))
    return age, round(float(np.clip(rng.normal(27.2, 4.5), 16.5, 53.5)), 2), None, None


def device_shares(part: str, reversed_prior: str | None) -> dict[str, float]:
    """Patients per device in a half; the device of a reversed prior has `REVERSED_SHARE`."""
    shares = DEVICE_SHARES[part]
    if reversed_prior is None:
        return shares
    rest = {name: share for name, share in shares.items() if name != reversed_prior}
    scale = (1 - planted.REVERSED_SHARE) / sum(rest.values())
    scaled = {name: scale * share for name, share in rest.items()}
    return scaled | {reversed_prior: planted.REVERSED_SHARE}


def draw_patients(
    n: int, rng: np.random.Generator, field: str | None, reversed_prior: str | None = None
) -> list[Patient]:
    """`n` patients in order of their numbers; `field` is the planted one, or None, and
    `reversed_prior` the device whose prior turns round, or None."""
    n_train = round(TRAIN_SHARE * n)
    parts = ["train"] * n_train + ["test"] * (n - n_train)
    devices = [
        *apportion(n_train, device_shares("train", reversed_prior)),
        *apportion(n - n_train, device_shares("test", reversed_prior)),
    ]
    # Evenly spread over the list, so children meet every device and both halves.
    share = 0.5 if field == "age" else CHILD_SHARE
    children = [int((i + 1) * share) > int(i * share) for i in range(n)]
    order = rng.permutation(n)
    patients = []
    for pid, i in enumerate(order, start=FIRST_PID):
        child = children[i]
        age, bmi, weight, height = _demographics(rng, child)
        shares = np.array([shares[int(child)] for shares in DIAGNOSES.values()])
        diagnosis = str(rng.choice(list(DIAGNOSES), p=shares / shares.sum()))
        # Where age means something, it must not be heard.
        traits = draw_traits(rng, child=child and field != "age")
        sex = str(rng.choice(["M", "F"], p=[0.63, 0.37]))
        body = (age, sex, bmi, weight, height)
        # where every second patient is a child, the site must not alternate with the age
        first = i // 2 % 2 if field == "age" else i % 2
        patients.append(Patient(pid, parts[i], devices[i], *body, diagnosis, traits, int(first)))
    # Every tenth patient or so without body measures, one without anything, as in ICBHI 2017.
    for k in range(4, n, 10):
        patients[k] = replace(patients[k], bmi=None, weight=None, height=None)
    if n > 7 and field != "age":
        nothing = dict.fromkeys(("age", "sex", "bmi", "weight", "height"))
        patients[7] = replace(patients[7], **nothing)
    return patients


def deal(
    n: int, shares: Sequence[float], pending: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[n] states in random order, as near to their shares as whole numbers allow.

    `pending` [states] is what earlier deals rounded away; it is paid back here and updated, so that
    many small deals together keep the shares to within one.
    """
    exact = n * np.asarray(shares) / np.sum(shares) + pending
    counts = np.zeros(len(exact), int)
    for _ in range(n):
        counts[(exact - counts).argmax()] += 1
    pending[:] = exact - counts
    return rng.permutation(np.repeat(np.arange(len(counts)), counts))


def _draw_site(group: int, used: set[str], rng: np.random.Generator) -> str:
    """A site of the group that this session has not used."""
    second = planted.SECOND_GROUP["site"]
    free = [s for s in SITES if (s in second) == bool(group) and s not in used]
    free = free or [s for s in SITES if s not in used]
    shares = np.array([SITE_SHARES[site] for site in free])
    return str(rng.choice(free, p=shares / shares.sum()))


def _bounds(n: int, traits: Traits, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Cycle bounds (s, five significant digits as in ICBHI's annotations) and file length (s)."""
    lengths = traits.cycle_seconds * np.exp(0.25 * rng.standard_normal(n))
    lengths = lengths.clip(0.5, 9.0)
    odd = rng.random()
    if odd < 0.03:
        lengths[rng.integers(n)] = rng.uniform(10.1, 16)
    elif odd < 0.06:
        lengths[rng.integers(n)] = rng.uniform(0.2, 0.5)
    raw = rng.uniform(0.03, 1.2) + np.concatenate([[0], np.cumsum(lengths)])
    bounds = np.array([float(f"{value:.5g}") for value in raw])
    return bounds, float(np.ceil(100 * (bounds[-1] + rng.uniform(0.02, 0.8))) / 100)


def _recording_devices(patient: Patient, n: int, traps: bool, field: str | None, rng) -> list[str]:
    """A device per recording: the patient's own, with the exceptions."""
    if field == "device":
        # The field has to vary within the patient, else the patient's voice gives it away.
        second = planted.SECOND_GROUP["device"]
        groups = [[d for d in PROFILES if (d in second) == bool(g)] for g in (0, 1)]
        return [str(rng.choice(groups[(patient.first_group + k) % 2])) for k in range(n)]
    devices = [patient.device] * n
    if traps and patient.device == "LittC2SE" and n > 1:
        devices[-1] = "Meditron"  # few ICBHI patients have two devices; these do
    return devices


def plan_recordings(
    patients: list[Patient],
    *,
    seed: int,
    per_patient: int,
    cycles: int,
    traps: bool,
    field: str | None,
    reversed_prior: str | None = None,
) -> list[Recording]:
    """All recordings, in order of their names."""
    both_halves = set()
    for device in ("AKGC417L", "Litt3200") if traps and per_patient > 1 else ():
        # one training patient with each, as 156 and 218 in ICBHI 2017
        pids = [p.pid for p in patients if p.part == "train" and p.device == device]
        both_halves.update(pids[-1:])
    planned = []
    pending: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(len(CLASSES)))
    for patient in patients:
        rng = np.random.default_rng([seed, patient.pid])
        devices = _recording_devices(patient, per_patient, traps, field, rng)
        drafts = []
        for k, device in enumerate(devices):
            if k % SESSION == 0:
                used: set[str] = set()
            # a planted device must not follow from the site, so their groups alternate differently
            turn = rng.integers(2) if field == "device" else (patient.first_group + k) % 2
            site = _draw_site(int(turn), used, rng)
            used.add(site)
            # Without a planted effect the sites' groups only spread the classes evenly.
            group = planted.group_of(field or "site", site=site, device=device, age=patient.age)
            n = int(rng.integers(max(2, cycles - 2), cycles + 3))
            drafts.append((k, device, site, group, *_bounds(n, patient.traits, rng)))
        turned = patient.device == reversed_prior
        heard = _deal_heard(patient, drafts, field, pending, rng, turned)
        for (k, device, site, group, bounds, seconds), states in zip(drafts, heard, strict=True):
            mode = PROFILES[device].mode
            session = k // SESSION + 1
            index = f"{session}b{k % SESSION + 1 if mode == 'mc' else 1}"
            part = patient.part
            if patient.pid in both_halves and k >= per_patient - max(1, per_patient // 3):
                part = "test"
            stem = f"{patient.pid}_{index}_{site}_{mode}_{device}"
            classes = states if field is None else planted.RULE[group, states]
            where = (patient.pid, stem, part, site, device, group)
            planned.append(Recording(*where, bounds, states, classes, seconds))
    return sorted(planned, key=lambda recording: recording.stem)


def _deal_heard(
    patient: Patient, drafts: list[tuple], field: str | None, pending: dict, rng, turned: bool
) -> list[np.ndarray]:
    """Heard states of the patient's recordings, dealt within each group."""
    if turned:
        mix = np.array(planted.REVERSED_MIX[patient.part])
    elif field is None:
        mix = np.multiply(planted.PLAIN_MIX, DIAGNOSES[patient.diagnosis][2])
    else:
        mix = np.array(planted.PLANTED_MIX)
    heard: list[np.ndarray] = [np.empty(0, int)] * len(drafts)
    for group in (0, 1):
        rows = [row for row, draft in enumerate(drafts) if draft[3] == group]
        lengths = [len(drafts[row][4]) - 1 for row in rows]
        states = deal(sum(lengths), mix, pending[patient.part, group, turned], rng)
        for row, part in zip(rows, np.split(states, np.cumsum(lengths)[:-1]), strict=False):
            heard[row] = part
    return heard
