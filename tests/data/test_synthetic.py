"""The synthetic corpus: its form, its sounds, and that the planted effect is what it claims."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
from scipy import signal
from scipy.ndimage import uniform_filter1d
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from data.corpora.icbhi import completeness, read_cycles
from data.splits import split_cycles
from data.synthetic import corpus as synthetic
from data.synthetic.corpus import (
    CYCLES,
    MARKER,
    main,
    planted,
    write_corpus,
)
from data.synthetic.sounds import PROFILES, draw_traits, render
from data.task import CLASSES
from utils.common.errors import UserError

TINY = {"patients": 6, "recordings_per_patient": 2, "cycles_per_recording": 2}
#: The second group, written out once more so that a slip in `planted` shows.
SIDE_AND_BACK = {"Ll", "Lr", "Pl", "Pr"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "corpus"
    write_corpus(folder, **TINY)
    return folder


@pytest.fixture(scope="module")
def planted_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "corpus"
    report = write_corpus(
        folder,
        patients=14,
        recordings_per_patient=4,
        cycles_per_recording=3,
        planted_effect="site",
    )
    return folder, report


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_heard(folder):
    """The cycle table with what is heard."""
    heard = pd.read_csv(folder / CYCLES)
    table = read_cycles(folder).merge(heard, on=["Filename", "CycleIndex"], validate="1:1")
    assert len(table) == len(heard)
    table["heard"] = table.CracklesHeard + 2 * table.WheezesHeard
    table["class"] = table.Crackles + 2 * table.Wheezes
    return table


# ---- form ---------------------------------------------------------------------------------------


def test_sampling_rates_and_depths_are_the_devices(synthetic_corpus):
    seen = {}
    for path in synthetic_corpus.glob("*.wav"):
        info = soundfile.info(path)
        assert info.channels == 1
        device = path.stem.rsplit("_", 1)[1]
        seen.setdefault(device, set()).add((info.samplerate, info.subtype))
    assert set(seen) == set(PROFILES)
    assert {rate for rate, _ in seen["Litt3200"]} == {4000}
    assert all(
        {rate for rate, _ in kinds} == {44100} for d, kinds in seen.items() if d != "Litt3200"
    )
    assert {kind for kinds in seen.values() for _, kind in kinds} >= {"PCM_16", "PCM_24"}


def test_the_reader_accepts_it_as_partial(synthetic_corpus):
    assert len(list(synthetic_corpus.glob("*.wav"))) == 30
    table = read_cycles(synthetic_corpus)
    report = json.loads((synthetic_corpus / MARKER).read_text())["report"]
    assert len(table) == sum(n for part in report["cycles"].values() for n in part.values())
    assert completeness(table).partial
    assert 2.0 < table.Duration.median() < 3.0
    assert table.groupby("PID").Device.nunique().max() == 1


def test_every_class_is_in_every_part(synthetic_corpus):
    table = with_heard(synthetic_corpus)
    assert (table.heard == table["class"]).all()  # nothing is planted
    split = split_cycles(table)
    for rows in (split.train, split.val, split.test):
        assert set(table["class"].iloc[rows]) == {0, 1, 2, 3}
    patients = table.groupby("class").PID.nunique()
    assert patients.min() >= 6
    assert table.groupby("PID")["class"].nunique().min() >= 3


def test_larger_corpora_have_the_traps():
    from data.synthetic.cohort import draw_patients, plan_recordings

    patients = draw_patients(24, np.random.default_rng(0), None)
    shape = {"seed": 0, "per_patient": 3, "cycles": 7, "field": None}
    for traps in (True, False):
        plan = plan_recordings(patients, traps=traps, **shape)
        parts = pd.DataFrame([(r.pid, r.part, r.device) for r in plan], columns=list("ptd"))
        both = parts[parts.groupby("p").t.transform("nunique") == 2]
        assert set(both.d) == ({"AKGC417L", "Litt3200"} if traps else set())
        assert (parts.groupby("p").d.nunique() == 2).any() == traps
    assert parts[parts.t == "test"].d.nunique() == 3 and "LittC2SE" not in set(
        parts[parts.t == "test"].d
    )
    assert 0.5 < (parts.t == "train").mean() < 0.65


# ---- sound --------------------------------------------------------------------------------------


def rendered(device, heard, seed=0):
    """Two cycles of 3 s: the first as asked, the second without events; (wave per cycle, rate)."""
    rng = np.random.default_rng(seed)
    bounds = np.array([0.1, 3.1, 6.1])
    sounds = np.array([[heard & 1, heard >> 1], [0, 0]], bool)
    wave = render(bounds, sounds, 6.2, PROFILES[device], draw_traits(rng, child=False), 1.0, rng)
    rate = PROFILES[device].rate
    assert len(wave) == round(6.2 * rate) and np.abs(wave).max() <= 1
    return [wave[int(a * rate) : int(b * rate)] for a, b in ((0.1, 3.1), (3.1, 6.1))], rate


def tonality(wave, rate):
    """How far a line that lasts .2 s stands out of its surroundings, where it does so most."""
    n = int(0.064 * rate)
    f, _, power = signal.spectrogram(wave, rate, nperseg=n, noverlap=n // 2, nfft=2 * n)
    power = uniform_filter1d(power[(f > 150) & (f < 1900)], 7, axis=1)
    return np.log((power / uniform_filter1d(power, 41, axis=0)).max())


def burstiness(wave, rate):
    """Kurtosis of the band where crackles stand out of the breath (0 for Gaussian noise)."""
    band = signal.sosfilt(signal.butter(4, (250, 1500), "bandpass", fs=rate, output="sos"), wave)
    return np.mean(band**4) / np.mean(band**2) ** 2 - 3


@pytest.mark.parametrize("device", list(PROFILES))
def test_events_are_where_they_are_planted(device):
    tones, bursts = [], []
    for seed in range(6):
        (with_wheeze, quiet), rate = rendered(device, 2, seed)
        tones.append(tonality(with_wheeze, rate) - tonality(quiet, rate))
        (with_crackles, quiet), rate = rendered(device, 1, seed)
        bursts.append(burstiness(with_crackles, rate) - burstiness(quiet, rate))
    assert np.median(tones) > 0.4, tones
    assert np.median(bursts) > 3, bursts


# ---- planted effect -----------------------------------------------------------------------------


def test_best_score_against_hand_computation():
    # Heard x: 6 normal, 3 crackle. Heard y: 2 normal, 1 crackle, 4 wheeze. N = 8, A = 8.
    observations = ["x"] * 9 + ["y"] * 7
    classes = [0] * 6 + [1] * 3 + [0] * 2 + [1] + [2] * 4
    # x -> normal (6/8 over 3/8), y -> wheeze (4/8 over 2/8): (75 % + 50 %) / 2.
    assert planted.best_score(observations, classes) == pytest.approx(62.5)
    # Two classes: y -> abnormal 5/8 over 2/8: (75 % + 62.5 %) / 2.
    assert planted.best_score(observations, classes, 2) == pytest.approx(68.75)
    # The Score, not accuracy: the minority in every observation may still be the better answer.
    assert planted.best_score(["x"] * 10, [0] * 9 + [1]) == pytest.approx(50)
    assert planted.best_score(["x"] * 8 + ["y"] * 3, [0] * 8 + [0, 0, 1]) == pytest.approx(90)
    with pytest.raises(ValueError, match="abnormal"):
        planted.best_score(["x"], [0])


def test_expected_scores_against_hand_computation():
    # Normal: .28 heard nothing + half of .48 = .52; abnormal .48. By ear alone: nothing -> normal
    # .28/.52; each other state -> one of two classes, .12/.48. Two classes: both sounds are
    # always abnormal, .24/.48.
    expected = planted.expected_scores()
    for n_cls, heard in (("4", 3 * 0.12 / 0.48), ("2", 2 * 0.12 / 0.48 + 0.24 / 0.48)):
        sound = 50 * (0.28 / 0.52 + heard)
        expected_n = {"sound": sound, "sound_and_field": 100, "field": 50}
        assert expected[n_cls] == pytest.approx(expected_n)


def test_annotation_follows_sound_and_site_alone(planted_corpus):
    folder, report = planted_corpus
    table = with_heard(folder)
    group = table.AuscLoc.isin(SIDE_AND_BACK).astype(int)
    assert (group == table.Group).all()
    meaning = [("normal", "crackle", "normal", "both"), ("normal", "normal", "crackle", "wheeze")]
    for g, heard, annotated in zip(group, table.heard, table["class"], strict=True):
        assert meaning[g][heard] == CLASSES[annotated]
    test = table[table.Split == "test"]
    again = planted.reachable_scores(test.heard, test.Group, test["class"])
    assert report.best_score["test"] == again
    assert report.best_score["test"]["4"]["sound"] < 72
    assert report.best_score["test"]["4"]["sound_and_field"] == 100


def test_site_is_independent_of_sound_and_patient(planted_corpus):
    table = with_heard(planted_corpus[0])
    assert (table.groupby("PID").Group.nunique() == 2).all()
    assert abs(table.Group.mean() - 0.5) < 0.06
    for _, part in table.groupby("Split"):
        shares = pd.crosstab(part.heard, part.Group, normalize="columns")
        assert (shares[0] - shares[1]).abs().max() < 0.06
        abnormal = part.groupby("Group")["class"].apply(lambda c: (c > 0).mean())
        assert abs(abnormal[0] - abnormal[1]) < 0.06


def features(folder, table):
    """[N, 12] level, spectrum, burstiness, tonality and length of each cycle."""
    rows = []
    for name, cycles in table.groupby("Filename", sort=False):
        wave, rate = soundfile.read(folder / f"{name}.wav", dtype="float32")
        if rate > 16000:
            wave, rate = signal.resample_poly(wave, 4, 11), rate * 4 / 11
        for begin, end in zip(cycles.CycleStart, cycles.CycleEnd, strict=True):
            cycle = wave[int(begin * rate) : int(end * rate)]
            f, power = signal.welch(cycle, rate, nperseg=512)
            edges = (60, 120, 200, 300, 450, 650, 900, 1200, 1600, 2000)
            level = [np.log(power[(f >= a) & (f < b)].mean()) for a, b in itertools.pairwise(edges)]
            rows.append([*level, burstiness(cycle, rate), tonality(cycle, rate), end - begin])
    return np.array(rows)


def test_a_probe_cannot_hear_the_planted_field(planted_corpus):
    folder, _ = planted_corpus
    table = with_heard(folder)
    sound = features(folder, table)

    def heard_by_probe(target):
        probe = GradientBoostingClassifier(n_estimators=40, max_depth=2, random_state=0)
        guess = cross_val_predict(probe, sound, target, groups=table.PID, cv=GroupKFold(4))
        return balanced_accuracy_score(target, guess)

    assert heard_by_probe(table.AuscLoc.isin(SIDE_AND_BACK).to_numpy()) < 0.58
    # The same probe hears what can be heard: device and events.
    assert heard_by_probe((table.Device == "AKGC417L").to_numpy()) > 0.8
    assert heard_by_probe((table.heard >= 2).to_numpy()) > 0.75
    assert heard_by_probe((table.heard % 2 == 1).to_numpy()) > 0.75


def test_a_planted_device_does_not_betray_itself(tmp_path, quick):
    write_corpus(tmp_path / "c", planted_effect="device", **TINY)
    table = with_heard(tmp_path / "c")
    second = table.Device.isin(["Litt3200", "Meditron"]).astype(int)
    assert (second == table.Group).all() and (table.groupby("PID").Group.nunique() == 2).all()
    infos = [soundfile.info(path) for path in (tmp_path / "c").glob("*.wav")]
    assert len({(info.samplerate, info.subtype) for info in infos}) == 1


@pytest.mark.parametrize("field", list(planted.SECOND_GROUP))
def test_no_other_factor_predicts_the_field(field):
    from data.synthetic.cohort import draw_patients, plan_recordings

    patients = draw_patients(120, np.random.default_rng(0), field)
    shape = {"seed": 0, "per_patient": 3, "cycles": 7, "traps": False}
    plan = pd.DataFrame(plan_recordings(patients, field=field, **shape))
    for other in {"site", "device"} - {field}:
        guess = plan.groupby(other).group.agg(lambda groups: groups.mode()[0])
        known = balanced_accuracy_score(plan.group, plan[other].map(guess))
        assert known < 0.6, f"{other} predicts {field} in {known:.2f}"


# ---- dealing ------------------------------------------------------------------------------------


# ---- the folder ---------------------------------------------------------------------------------


def test_same_arguments_same_bytes(tiny, tmp_path):
    report = write_corpus(tmp_path / "again", **TINY)
    assert report.written and contents(tmp_path / "again") == contents(tiny)
    write_corpus(tmp_path / "other", **TINY, seed=1)
    first, other = contents(tiny), contents(tmp_path / "other")
    assert not any(first[name] == other.get(name) for name in first if name.endswith(".wav"))


@pytest.fixture
def quick(monkeypatch):
    """Noise instead of sound, for tests of the folder."""

    def noise(bounds, sounds, seconds, profile, traits, event_level, rng):
        return 0.1 * rng.standard_normal(round(seconds * 1000)).clip(-1, 1)

    monkeypatch.setattr(synthetic, "render", noise)


def test_an_equal_corpus_stays_a_damaged_one_is_redone(tmp_path, quick, caplog):
    folder = tmp_path / "corpus"
    write_corpus(folder, **TINY)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = write_corpus(folder, **TINY)
    assert not report.written and "unchanged" in report.text()
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    before = contents(folder)
    next(folder.glob("*.wav")).write_bytes(b"damaged")
    assert write_corpus(folder, **TINY).written
    assert "missing or changed" in caplog.text
    assert contents(folder) == before


def test_own_corpus_is_replaced(tmp_path, quick):
    folder = tmp_path / "corpus"
    write_corpus(folder, **TINY)
    (folder / "icbhi_metadata.csv").write_text("derived")
    assert not write_corpus(folder, **TINY).written
    assert write_corpus(folder, **TINY, seed=1).written
    assert not (folder / "icbhi_metadata.csv").exists()
    assert json.loads((folder / MARKER).read_text())["arguments"]["seed"] == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_anything_else_is_refused_and_untouched(tmp_path, quick):
    foreign = tmp_path / "real"
    foreign.mkdir()
    (foreign / "101_1b1_Al_sc_Meditron.wav").write_bytes(b"precious")
    with pytest.raises(UserError, match="name another folder"):
        write_corpus(foreign, **TINY)
    assert contents(foreign) == {"101_1b1_Al_sc_Meditron.wav": b"precious"}

    mixed = tmp_path / "mixed"
    write_corpus(mixed, **TINY)
    (mixed / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_corpus(mixed, **TINY, seed=1)
    assert (mixed / "notes.txt").read_text() == "mine"

    for marker in ("{}", "{", "[]"):
        (mixed / MARKER).write_text(marker)
        with pytest.raises(UserError, match="does not describe"):
            write_corpus(mixed, **TINY)
    with pytest.raises(UserError, match="is a file"):
        write_corpus(mixed / "notes.txt", **TINY)


def test_a_failure_leaves_nothing_half_written(tmp_path, quick, monkeypatch):
    folder = tmp_path / "corpus"
    write_corpus(folder, **TINY)
    before = contents(folder)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_write_tables", fail)
    for output in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            write_corpus(output, **TINY, seed=1)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 3}, "patients is 3"),
        ({"planted_effect": "duration"}, "site, device, age"),
        ({"planted_effect": "site", "recordings_per_patient": 1}, "recordings_per_patient"),
        ({"seed": -1}, "seed is -1"),
        ({"reversed_prior": "Rode"}, "is no device; choose one of"),
        ({"reversed_prior": "Meditron", "planted_effect": "age"}, "hide each other"),
        ({"event_level": 0}, "event_level is 0"),
    ],
)
def test_impossible_arguments_name_the_remedy(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        write_corpus(tmp_path / "c", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_prior_turns_round_between_the_halves(tmp_path, quick):
    """One device is abnormal in training and normal in the test half; the others stay."""
    folder = tmp_path / "c"
    report = write_corpus(folder, patients=60, seed=1, reversed_prior="Litt3200")
    assert not write_corpus(folder, patients=60, seed=1, reversed_prior="Litt3200").written
    table = read_cycles(folder, require_audio=False)
    abnormal = (table["Crackles"] | table["Wheezes"]).groupby([table["Device"], table["Split"]])
    share = abnormal.mean().unstack()
    assert share.loc["Litt3200", "train"] > 0.8 and share.loc["Litt3200", "test"] < 0.2
    others = share.drop("Litt3200").to_numpy()
    others = others[~np.isnan(others)]
    assert others.min() > 0.35 and others.max() < 0.65
    patients = table.drop_duplicates("PID").groupby("Split")["Device"].value_counts(normalize=True)
    for part in ("train", "test"):
        assert patients[part, "Litt3200"] == pytest.approx(0.4, abs=0.05)
    assert report.best_score is None


def test_command_line(tmp_path, quick, capsys):
    shape = ["--patients", "6", "--recordings-per-patient", "2", "--cycles-per-recording", "2"]
    assert main(["--output", str(tmp_path / "c"), *shape, "--planted-effect"]) == 0
    out = capsys.readouterr().out
    assert "site" in out and "without metadata" in out and "100.0" in out
    assert max(map(len, out.splitlines()[1:])) <= 100
    marker = json.loads((tmp_path / "c" / MARKER).read_text())
    assert marker["arguments"]["planted_effect"] == "site" and "Synthetic" in marker["statement"]
    assert main(["--output", str(tmp_path / "c" / MARKER), *shape]) == 2
    err = capsys.readouterr().err
    assert "error: " in err and "is a file" in " ".join(err.split())
