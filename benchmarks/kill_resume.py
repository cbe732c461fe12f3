"""Kill a training run at random moments, resume it, and compare it with one that was never killed.

    python -m benchmarks.kill_resume [--kills 100] [--seed 0] [--output benchmarks/results]

Every attempt is a process of its own that runs the command of the SoftFiLM script (dropout,
augmentation, annealed masks and early stopping on, a checkpoint every 20 ms). SIGKILL takes it at
a random moment, drawn from the time that a whole run takes; the same command then goes on in the
same folder, until a run survives to its report. Then another run begins in a new folder, until the
kills are used up. All reports, weights, predictions and histories must be those of the run that was
never killed; exit status 1 if one is not. Only the pictures are left out: drawing them takes longer
than the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from utils.common.files import TEMPORARY, write_text
from utils.training.checkpoint import Checkpoint, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
VARIANT = "ast_softfilm"
#: The run: seconds long, with everything that has a state.
OVERRIDES = (
    "dataset.store_workers=1",
    "dataset.cycle_metadata_path=null",
    "dataset.batch_size=8",
    "dataset.h=32",
    "dataset.w=48",
    "audio.clip_seconds=0.5",
    "augment.speed_probability=0.5",
    "augment.noise_probability=0.5",
    "augment.specaugment_probability=0.5",
    "augment.freq_mask_width=8",
    "augment.time_mask_width=8",
    "backbone.weights=none",
    "backbone.embed_dim=16",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.freq_stride=16",
    "backbone.time_stride=16",
    "models.ast_softfilm.conditioned_layers=all",
    "models.ast_softfilm.input_fdim=32",
    "models.ast_softfilm.input_tdim=48",
    "models.ast_softfilm.mask_annealing=true",
    "models.ast_softfilm.mask_annealing_epochs=8",
    "training.epochs=8",
    "training.warmup_epochs=1",
    "training.lr=1e-3",
    "training.early_stopping_patience=7",
    "training.device=cpu",
    "training.checkpoint_minutes=0.0003",
    "mlflow.enabled=false",
)


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: processes killed.
        runs: runs that came to their end after at least one kill.
        before, training, after: kills before the first checkpoint, between it and the end of the
            training, and while the test half was evaluated and reported.
        half_written: kills that left a half-written file.
        most: kills of one run.
        differences: what was not equal, in words.
        whole_s: how long the run takes that is never killed, s; seconds: of everything.
    """

    kills: int = 0
    runs: int = 0
    before: int = 0
    training: int = 0
    after: int = 0
    half_written: int = 0
    most: int = 0
    differences: list[str] = field(default_factory=list)
    whole_s: float = 0.0
    seconds: float = 0.0


def arguments(corpus: Path, cache: Path, runs: Path, overrides: Sequence[str]) -> list[str]:
    """The command line of one run."""
    places = (
        f"dataset.data_folder={corpus}",
        f"dataset.cache_dir={cache}",
        f"training.output_dir={runs}",
        f"training.checkpoint_dir={runs / 'published'}",
    )
    return ["--config", str(ROOT / "configs" / "ast_film_soft_config.yaml"), *overrides, *places]


def execute(words: list[str]) -> None:
    """What the process does: the script's own main, silently."""
    import ast_film_soft
    import utils.runs.end as summary

    summary.draw_figures = lambda *_: None
    torch.set_num_threads(1)
    sys.argv = ["ast_film_soft.py", *words]
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    sys.exit(ast_film_soft.main())


def processes() -> Any:
    """Context whose processes start with the libraries imported: a fork of a clean server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ast_film_soft"])
    first = context.Process(target=int)  # waits for the server's imports
    first.start()
    first.join()
    return context


class Result:
    """What a finished run left behind."""

    def __init__(self, runs: Path):
        (folder,) = (path.parent for path in runs.glob("*/report.json"))
        self.checkpoint = load_checkpoint(folder / "checkpoints" / "best.pt")
        self.predictions = [path.read_text() for path in sorted(folder.glob("predictions/*.csv"))]
        self.report = json.loads((folder / "report.json").read_text())
        self.report.pop("revision")  # the checkout may change while this runs
        with (folder / "metrics.csv").open() as file:
            self.history = [
                {k: v for k, v in row.items() if k != "train_clips_per_s"}
                for row in csv.DictReader(file)
            ]
        self.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    def differences(self, other: Result) -> list[str]:
        """Names of what is not equal bit for bit."""
        names = [
            f"weights {name}"
            for name, value in self.checkpoint.weights.items()
            if not torch.equal(value, other.checkpoint.weights[name])
        ]
        for what in ("predictions", "report", "history", "files"):
            if getattr(self, what) != getattr(other, what):
                names.append(what)
        if _plain(self.checkpoint) != _plain(other.checkpoint):
            names.append("checkpoint")
        return names


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything in a checkpoint but weights and what depends on the place."""
    placed = ("weights", "config", "revision")
    return {key: value for key, value in vars(checkpoint).items() if key not in placed}


def kill_and_compare(
    kills: int,
    folder: Path,
    *,
    seed: int = 0,
    overrides: Sequence[str] = OVERRIDES,
    progress: bool = False,
) -> Tally:
    """Kill `kills` processes; a finished run is compared and followed by another.

    Args:
        folder: where corpus and runs are put.
        seed: of the random moments.
        overrides: the run's configuration.
        progress: count on stderr.
    """
    from data.synthetic.corpus import write_corpus

    corpus, cache = folder / "corpus", folder / "cache"
    write_corpus(corpus, patients=10, seed=0)
    context, generator, tally = processes(), random.Random(seed), Tally()
    started = time.monotonic()
    _finish(context, arguments(corpus, cache, folder / "whole", overrides))
    tally.whole_s = time.monotonic() - started
    whole = Result(folder / "whole")
    while tally.kills < kills:
        runs = folder / f"run-{tally.runs}"
        words = arguments(corpus, cache, runs, overrides)
        hits = 0
        while tally.kills < kills and _killed(context, words, generator, tally):
            hits += 1
            _locate(runs, tally)
            if progress:
                print(f"\r{tally.kills} kills, {tally.runs} runs finished", end="", file=sys.stderr)
        _finish(context, words)
        tally.differences += [f"run {tally.runs}: {d}" for d in Result(runs).differences(whole)]
        tally.runs, tally.most = tally.runs + 1, max(tally.most, hits)
    tally.seconds = time.monotonic() - started
    return tally


def _killed(context, words: list[str], generator: random.Random, tally: Tally) -> bool:
    """Start, wait a random while, kill. False when the run had finished by then."""
    process = context.Process(target=execute, args=(words,))
    process.start()
    process.join(generator.uniform(0.0, tally.whole_s))
    process.kill()
    process.join()
    if process.exitcode == 0:
        return False
    if process.exitcode != -9:
        raise RuntimeError(f"the run ended by itself with status {process.exitcode}")
    tally.kills += 1
    return True


def _finish(context, words: list[str]) -> None:
    process = context.Process(target=execute, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run ended with status {process.exitcode}")


def _locate(runs: Path, tally: Tally) -> None:
    """Count where a kill fell."""
    tally.half_written += any(runs.rglob(TEMPORARY))
    if any(runs.glob("*/checkpoints/best.pt")):
        tally.after += 1
    elif any(runs.glob("*/checkpoints/last.pt")):
        tally.training += 1
    else:
        tally.before += 1


def to_markdown(result: dict[str, Any]) -> str:
    """Table for `benchmarks/results`."""
    rows = "\n".join(
        f"| {label} | {result[key]} |"
        for key, label in (
            ("kills", "processes killed (SIGKILL)"),
            ("runs", "runs finished, each resumed after every kill"),
            ("most", "most kills of one run"),
            ("before", "kills before the first checkpoint"),
            ("training", "kills during training"),
            ("after", "kills during test and report"),
            ("half_written", "kills that left a half-written file"),
            ("identical", "runs identical to the one never killed"),
            ("whole_s", "s that a run takes without kills"),
            ("seconds", "s in all"),
        )
    )
    return (
        f"# Killed and resumed, {result['date']}\n\n"
        f"`{result['command']}`\n\n"
        "Identical means: weights bit for bit, predictions, report, history of every epoch, and\n"
        "the same files in the run folder.\n\n"
        f"| | |\n|---|---:|\n{rows}\n"
    )


def main() -> int:
    """Measure, print, and write the results where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output", type=Path, help="folder for kill_resume.json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_and_compare(args.kills, Path(folder), seed=args.seed, progress=True)
    wrong = {text.split(":")[0] for text in tally.differences}
    result = {
        "benchmark": "kill_resume",
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.kill_resume --kills {args.kills} --seed {args.seed}",
        **asdict(tally),
        "identical": tally.runs - len(wrong),
    }
    result["whole_s"], result["seconds"] = round(tally.whole_s, 1), round(tally.seconds)
    table = to_markdown(result)
    print(f"\n{table}")
    if args.output:
        write_text(args.output / "kill_resume.json", json.dumps(result, indent=1) + "\n")
        write_text(args.output / "kill_resume.md", table)
    print(json.dumps(result))
    return int(bool(tally.differences))


if __name__ == "__main__":
    sys.exit(main())
