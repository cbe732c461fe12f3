"""Does the protocol do what it promises? Two simulations on the real structure of ICBHI.

    python -m experiments.protocol_simulation [--repetitions 1000] [--output benchmarks/results]

1. Coverage: how often a 95 % interval contains the true value, resampling patients or cycles.
2. Selection: what choosing the epoch and the threshold on the test half adds to the Score of
   predictions that are independent of the labels, and what the other selection rules give.

The structure (each patient's cycles per class, both halves of the official split) is in
`patient_cycles.csv`, counted from the annotations of ICBHI 2017 (Rocha et al. 2019); where all
annotations are present (ICBHI_ROOT/annotations), the counts are compared with them first.
Writes protocol_simulation.json and .md.
"""

from __future__ import annotations

import json
import os
import time
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.harness import options, table
from data.corpora.icbhi import read_cycles
from data.task import CLASSES, Task
from utils.common.files import write_text
from utils.metrics.bootstrap import Interval, patient_bootstrap, percentiles
from utils.metrics.score import choose_thresholds, metrics_of, sp_se_score

STRUCTURE = Path(__file__).parent / "patient_cycles.csv"
TASK = Task(2)
CORRELATIONS = (0.1, 0.3)
SPECIFICITY, SENSITIVITY = 0.78, 0.66  # of the simulated model, near the published two-class rows
METRICS = ("sp", "se", "score")
PAGE = f"""# Protocol simulation

`{{command}}`, {{date}}, {{seconds:.0f}} s. {{repetitions}} repetitions per row; counts compared \
with the annotations: {{checked}}.

Simulated predictions on the real structure of the official split; no results of any model. How to \
read the tables: docs/protocol.md.

## Coverage of the 95 % interval

Two classes, Sp {100 * SPECIFICITY:g}, Se {100 * SENSITIVITY:g}, rates that vary between patients; \
bootstrap over patients or cycles, width in points.

{{covered}}

## Score of predictions that are independent of the labels

Two classes, 100 epochs; mean (sd) over runs. `fixed`: last epoch, threshold 0.5. `validation`: \
epoch and threshold chosen on a random fifth of the training patients. `test`: both chosen on the \
test half. Memory is the correlation of consecutive epochs.

{{selected}}
"""


@cache
def read_structure(part: str) -> np.ndarray:
    """Cycles of each patient [P, 2]: normal, abnormal; part is "train" or "test"."""
    counts = pd.read_csv(STRUCTURE).query("part == @part")
    return np.stack([counts["normal"], counts[list(CLASSES[1:])].sum(axis=1)], axis=1)


def check_structure(data_folder: str | Path) -> bool:
    """True if the committed counts equal those of the annotations in `data_folder`."""
    cycles = read_cycles(data_folder, require_audio=False)
    number = cycles["Crackles"] + 2 * cycles["Wheezes"]
    counts = pd.crosstab([cycles["Split"], cycles["PID"]], number)
    counts.columns, counts.index.names = list(CLASSES), ["part", "patient"]
    return pd.read_csv(STRUCTURE).equals(counts.reset_index())


# --- coverage -----------------------------------------------------------------------------------


def draw_tables(structure: np.ndarray, correlation: float, rng: np.random.Generator) -> np.ndarray:
    """Confusion matrices [P, 2, 2] of a model whose rates vary between patients.

    A patient's Sp and Se are beta variables with the means above and a + b = 1 / correlation - 1,
    which gives two cycles of a patient the intra-class correlation `correlation`; the expected
    figures are the means.
    """
    total = 1 / correlation - 1
    means = (SPECIFICITY, SENSITIVITY)
    rates = [rng.beta(m * total, (1 - m) * total, len(structure)) for m in means]
    right = rng.binomial(structure, np.stack(rates, axis=1))
    wrong = structure - right
    cells = [right[:, 0], wrong[:, 0], wrong[:, 1], right[:, 1]]
    return np.stack(cells, axis=1).reshape(-1, 2, 2)


def cycle_bootstrap(confusion: np.ndarray, *, resamples: int, seed: int) -> dict[str, Interval]:
    """95 % percentile intervals over resampled cycles, of which only the cells of their confusion
    matrix [C, C] change: too narrow, here to show by how much."""
    rng, n = np.random.default_rng(seed), confusion.sum()
    draws = rng.multinomial(n, (confusion / n).ravel(), size=resamples)
    samples = metrics_of(draws.reshape(resamples, *confusion.shape))
    values = metrics_of(confusion).items()
    return {name: Interval(float(v), *percentiles(samples[name], 0.95)) for name, v in values}


def coverage(correlation: float, *, repetitions: int, resamples: int, seed: int = 0) -> dict:
    """Share of intervals that hold the truth, and their mean width, for both bootstraps."""
    structure = read_structure("test")
    truth = {"sp": 100 * SPECIFICITY, "se": 100 * SENSITIVITY}
    truth["score"] = (truth["sp"] + truth["se"]) / 2
    rng, rows = np.random.default_rng(seed), []
    for repetition in range(repetitions):
        tables = draw_tables(structure, correlation, rng)
        options = {"resamples": resamples, "seed": repetition}
        for kind, found in (
            ("patient", patient_bootstrap(tables, **options)),
            ("cycle", cycle_bootstrap(tables.sum(axis=0), **options)),
        ):
            for name in METRICS:
                low, high = found[name].low, found[name].high
                rows.append((kind, name, low <= truth[name] <= high, high - low))
    frame = pd.DataFrame(rows, columns=["kind", "name", "coverage", "width"])
    means = frame.groupby(["kind", "name"], sort=False).mean()
    kinds = means.groupby(level=0, sort=False)
    return {kind: part.droplevel(0).to_dict("index") for kind, part in kinds}


# --- selection ----------------------------------------------------------------------------------


class Predictions:
    """Probabilities that know the patient but not the labels, epoch after epoch.

    latent = sqrt(r) * patient + sqrt(1 - r) * cycle, both standard normal and, over epochs, AR(1)
    with coefficient `memory`; the probability is its normal distribution function, hence uniform.
    """

    def __init__(self, structure, correlation: float, memory: float, rng: np.random.Generator):
        self.patient = np.repeat(np.arange(len(structure)), structure.sum(axis=1))
        self.label = np.concatenate([np.repeat([0.0, 1.0], row) for row in structure])[:, None]
        self.weights = np.sqrt(correlation), np.sqrt(1 - correlation)
        self.memory, self.rng = memory, rng
        self.state = [rng.standard_normal(len(structure)), rng.standard_normal(len(self.patient))]

    def next_epoch(self) -> np.ndarray:
        """[N, 1] probabilities of the next epoch."""
        for k, state in enumerate(self.state):
            fresh = self.rng.standard_normal(len(state))
            self.state[k] = self.memory * state + np.sqrt(1 - self.memory**2) * fresh
        latent = self.weights[0] * self.state[0][self.patient] + self.weights[1] * self.state[1]
        # logistic function of 1.702 x: within 0.01 of the normal distribution function
        return TASK.probabilities(1.702 * latent)[:, None]

    def score(self, probability: np.ndarray, thresholds: tuple[float, ...]) -> float:
        """Two-class Score in percent."""
        pred = TASK.predicted_classes(probability, thresholds)
        return sp_se_score(self.label[:, 0], pred).score


def one_run(correlation: float, memory: float, epochs: int, rng: np.random.Generator) -> dict:
    """Test Score of one label-independent run under each selection rule."""
    test = Predictions(read_structure("test"), correlation, memory, rng)
    train = read_structure("train")
    held_out = rng.choice(len(train), len(train) // 5, replace=False)
    val = Predictions(train[held_out], correlation, memory, rng)
    at_half, on_test, on_val, honest = [], [], [], []
    for _ in range(epochs):
        p_test, p_val = test.next_epoch(), val.next_epoch()
        at_half.append(test.score(p_test, (0.5,)))
        on_test.append(test.score(p_test, choose_thresholds(TASK, p_test, test.label)))
        chosen = choose_thresholds(TASK, p_val, val.label)
        on_val.append(val.score(p_val, chosen))
        honest.append(test.score(p_test, chosen))
    return {
        "fixed": at_half[-1],
        "validation": honest[int(np.argmax(on_val))],
        "test, threshold only": on_test[-1],
        "test, epoch only": max(at_half),
        "test": max(on_test),
    }


def selection(
    correlation: float, memory: float, *, repetitions: int, epochs: int = 100, seed: int = 0
) -> dict:
    """Mean, sd and standard error of the test Score (percent) under each selection rule."""
    rng = np.random.default_rng(seed)
    runs = [one_run(correlation, memory, epochs, rng) for _ in range(repetitions)]
    out = {}
    for rule in runs[0]:
        scores = np.array([run[rule] for run in runs])
        out[rule] = {"mean": scores.mean(), "sd": scores.std(ddof=1)}
        out[rule]["standard_error"] = out[rule]["sd"] / np.sqrt(repetitions)
    return out


def main() -> None:
    """Run both simulations and write the results."""
    args = options(__doc__, repetitions=1000, resamples=1000, output="benchmarks/results")
    start, n, checked = time.time(), args.repetitions, "annotations not present"
    folder = Path(os.environ.get("ICBHI_ROOT", "../shared/icbhi")) / "annotations"
    if folder.is_dir():
        checked = "equal" if check_structure(folder) else "DIFFERENT"
    covered, selected, shown_covered, shown_selected = {}, [], {}, {}
    for r in CORRELATIONS:
        covered[str(r)] = coverage(r, repetitions=n, resamples=args.resamples)
        for kind, row in covered[str(r)].items():
            cells = {name: f"{100 * row[name]['coverage']:.1f} %" for name in METRICS}
            cells["width of Score"] = f"{row['score']['width']:.1f}"
            shown_covered[f"correlation {r}, over {kind}s"] = cells
        for memory in (0.0, 0.9):
            scores = selection(r, memory, repetitions=n)
            selected.append({"correlation": r, "memory": memory, "scores": scores})
            cells = {rule: f"{v['mean']:.2f} ({v['sd']:.2f})" for rule, v in scores.items()}
            cells["inflation by `test`"] = f"**+{scores['test']['mean'] - 50:.1f} points**"
            shown_selected[f"correlation {r}, memory {memory}"] = cells
    command = f"python -m experiments.protocol_simulation --repetitions {n} "
    command += f"--resamples {args.resamples}"
    result = {"command": command, "date": date.today().isoformat(), "repetitions": n}
    result |= {"checked": checked, "coverage": covered, "selection": selected}
    result["seconds"] = time.time() - start
    page = PAGE.format(covered=table(shown_covered), selected=table(shown_selected), **result)
    write_text(Path(args.output, "protocol_simulation.json"), json.dumps(result, indent=1) + "\n")
    write_text(Path(args.output, "protocol_simulation.md"), page)
    print(page)


if __name__ == "__main__":
    main()
