"""Kill training commands at random moments, resume them, and compare with ones never killed.

    python -m benchmarks.kill_resume [--kills 100] [--seed 0] [--output benchmarks/results]

Two commands take turns: SoftFiLM's script (dropout, augmentation, annealed masks and early stopping
on, a checkpoint every 40 ms) as a plain run, and the same with --seeds 2, whose group is assembled
at the end. SIGKILL comes at a random moment of a random phase. The same command is then repeated in
the same folder until it survives, and everything it wrote (weights, predictions, reports, history)
must equal what the command that was never killed wrote; exit status 1 otherwise. Only pictures are
left out: drawing them takes longer than the run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import options, table
from data.synthetic.corpus import write_corpus
from utils.common.files import TEMPORARY, write_text
from utils.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = (ROOT / "configs" / "ast_film_soft_config.yaml", Path(__file__).with_suffix(".yaml"))
COMMANDS = {"plain": (), "group": ("--seeds", "2")}
#: `publishing`: the report is written, the end is not reached; `assembly`: of the group
PHASES = ("start", "training", "evaluation", "publishing", "assembly")


def execute(words: list[str], output: str = os.devnull, append: bool = False) -> None:
    """What the process does: the script's own main; what it prints goes into a file."""
    import ast_film_soft
    import utils.runs.end

    utils.runs.end.draw_figures = lambda *_: None
    torch.set_num_threads(1)
    sys.argv = ["ast_film_soft.py", *words]
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC))
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.exit(ast_film_soft.main())


class Commands:
    """The processes of all runs on one corpus; they start with the libraries imported.

    Args:
        folder: where corpus and runs are put.
        overrides: key=value words on top of kill_resume.yaml.
    """

    def __init__(self, folder: Path, *overrides: str):
        self.folder, self.overrides = folder, overrides
        write_corpus(
            folder / "corpus", patients=8, recordings_per_patient=2, cycles_per_recording=5
        )
        # asking for a GPU while libraries are imported must not open CUDA, which no fork survives
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["benchmarks.harness", "ast_film_soft", "utils.runs.run", "utils.figures.runs"]
        )
        first = self.context.Process(target=int)  # waits for the server's imports
        first.start()
        first.join()

    def start(self, kind: str, runs: Path, *words: str, output: str = os.devnull) -> Any:
        """Start a command whose runs lie in `runs`; returns its process."""
        words = ["--config", *map(str, CONFIGS), *COMMANDS[kind], *self.overrides, *words]
        words += [f"dataset.data_folder={self.folder / 'corpus'}", f"training.output_dir={runs}"]
        words += [f"dataset.cache_dir={self.folder / 'cache'}"]
        words += [f"training.checkpoint_dir={runs / 'published'}"]
        process = self.context.Process(target=execute, args=(words, output))
        process.start()
        return process

    def watch(self, kind: str, runs: Path, until: str = "") -> tuple[Any, dict[str, float]]:
        """Start a command; see it to its end, or to the phase `until`.

        Returns:
            The process, and the seconds that each phase took.
        """
        said = self.folder / f"{kind}.log"
        process, spent = self.start(kind, runs, output=str(said)), Counter()
        last = time.monotonic()
        while process.is_alive() and (now := phase(runs, kind)) != until:
            process.join(0.003)
            spent[now] += time.monotonic() - last
            last = time.monotonic()
        if process.exitcode:
            last_line = (said.read_text().splitlines() or [""])[-1]
            raise RuntimeError(
                f"the {kind} run ended by itself with status {process.exitcode}: {last_line}"
            )
        return process, spent


def phase(runs: Path, kind: str) -> str:
    """Where a command stands, by what lies in its folder."""
    reports = {path.parent for path in runs.glob("*/report.json")}
    states = {path.parents[1] for path in runs.glob("*/checkpoints/last.pt")}
    if states & reports:
        return "publishing"  # the training state is removed last
    if any(path.parents[1] not in reports for path in runs.glob("*/checkpoints/best.pt")):
        return "evaluation"
    if states:
        return "training"
    if kind == "group" and len(reports) == 2 and not any(runs.glob("*/group.json")):
        return "assembly"
    return "start"


def fingerprint(runs: Path) -> dict[str, str]:
    """File -> digest of all that a finished command left and that must be the same every time."""
    found = {}
    for path in sorted(p for p in runs.rglob("*") if p.is_file() and p.suffix != ".lock"):
        content: Any = ""  # of logs, configurations and dated files: that they are there
        if path.suffix == ".json" and path.name not in ("tracking.json", "record.json"):
            content = json.loads(path.read_text().replace(str(runs), ""))
            content.pop("revision", None)  # the checkout may change while this runs
        elif path.suffix == ".pt":
            kept = load_checkpoint(path)
            weights = [(name, w.numpy().tobytes()) for name, w in sorted(kept.weights.items())]
            content = [weights, kept.thresholds, kept.epoch, kept.statistics, kept.counts]
        elif path.name == "metrics.csv":
            rows = csv.DictReader(path.read_text().splitlines())
            content = [{k: v for k, v in r.items() if k != "train_clips_per_s"} for r in rows]
        elif path.suffix == ".csv":
            content = path.read_text()
        digest = hashlib.sha256(repr(content).encode()).hexdigest()
        found[str(path.relative_to(runs))] = digest
    return found


def kill_and_compare(
    kills: int, commands: Commands, *, seed: int = 0, kinds: tuple[str, ...] = tuple(COMMANDS)
) -> dict[str, Any]:
    """Kill `kills` processes; a command that survives is compared and followed by the other one."""
    draw, started, whole, lengths = random.Random(seed), time.monotonic(), {}, {}
    for kind in kinds:
        runs = commands.folder / f"whole-{kind}"
        _, lengths[kind] = commands.watch(kind, runs)
        whole[kind] = fingerprint(runs)
    places, differences, finished = Counter(), [], 0
    while places["kills"] < kills:
        kind, runs = kinds[finished % len(kinds)], commands.folder / f"runs-{finished}"
        while places["kills"] < kills:
            aim = draw.choice([name for name in PHASES if lengths[kind][name]])
            process, _ = commands.watch(kind, runs, until=aim)
            process.join(draw.uniform(0.0, lengths[kind][aim]))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            half_written = any(runs.rglob(TEMPORARY))
            places.update(["kills", phase(runs, kind)], **{"half-written": half_written})
            print(f"\r{places['kills']} kills", end="", file=sys.stderr, flush=True)
        commands.watch(kind, runs)
        found = fingerprint(runs)
        wrong = {n for n in {**found, **whole[kind]} if found.get(n) != whole[kind].get(n)}
        differences += [f"{kind} {finished}: {', '.join(sorted(wrong))}"] if wrong else []
        finished += 1
    return {
        "kills": places["kills"],
        "finished": finished,
        "identical": finished - len(differences),
        **{f"killed in {name}": places[name] for name in PHASES},
        "left half-written files": places["half-written"],
        "differences": differences,
        "seconds": round(time.monotonic() - started),
    }


def main() -> int:
    """Measure, print, and write the results where that is asked for."""
    args = options(__doc__, kills=100, seed=0, output="")
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_compare(args.kills, Commands(Path(folder)), seed=args.seed)
    command = f"python -m benchmarks.kill_resume --kills {args.kills} --seed {args.seed}"
    page = f"# Killed and resumed, {date.today()}\n\n`{command}`\n\n"
    page += table({key: {"": value} for key, value in result.items()}) + "\n"
    if args.output:
        write_text(Path(args.output, "kill_resume.md"), page)
        write_text(Path(args.output, "kill_resume.json"), json.dumps(result, indent=1) + "\n")
    print(f"\n{page}\n{json.dumps(result)}")
    return int(bool(result["differences"]))


if __name__ == "__main__":
    sys.exit(main())
