"""Does a model lose by hearing shorter clips? The same training with and without length buckets.

    python -m experiments.buckets --icbhi DIR [--seeds 3] [--work DIR] [key=value ...]

The plain AST of planted_effect.yaml, on clips of 10 s, is trained on a synthetic corpus and on the
recordings of ICBHI that are there, each with one clip length and with `audio.buckets`; nothing is
selected (last epoch, thresholds 0.5) and nothing augmented.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import table
from data.synthetic.corpus import write_corpus
from experiments.leaky_split import Tested
from experiments.planted_effect import SETTINGS, Remembered, tables, write_page
from utils.common.cli import command
from utils.config.schema import RunConfig, load_config
from utils.training.assemble import build_data, build_trainer
from utils.training.build import build_frontend
from utils.training.device import Runtime

OUTPUT = Path(__file__).parent / "results" / "buckets.md"
LENGTHS = {"single length": "null", "buckets": "[2.5,5.0,10.0]"}
#: Strides of 16, so that there are 8 x 32 patches in 10 s.
WORDS = (
    *("models.ast={}", "audio.clip_seconds=10", "dataset.w=512", "models.ast.input_tdim=512"),
    *("dataset.batch_size=16", "training.epochs=15", "dataset.cycle_metadata_path=null"),
)
NOTE = """Percent, four classes, last epoch, thresholds 0.5; mean ± sd over n seeds, in brackets \
the 95 % patient bootstrap interval of that mean. The last row is the paired difference in points; \
seeds and patients are resampled together."""


def configure(folder: str, work: Path, buckets: str, seed: int, words: Sequence[str]) -> RunConfig:
    """Checked configuration of one run."""
    own = [f"dataset.data_folder={folder}", f"audio.buckets={buckets}", f"training.seed={seed}"]
    return load_config([SETTINGS], [*WORDS, *own, f"dataset.cache_dir={work / 'cache'}", *words])


def study(name: str, folder: str, work: Path, seeds: int, words: Sequence[str]) -> str:
    """The section of one corpus."""
    found, runtime = {}, Runtime("cpu", "fp32", "false")
    for length, buckets in LENGTHS.items():
        runs, known = [], {}
        for seed in range(seeds):
            config = configure(folder, work, buckets, seed, words)
            data = build_data(config)
            inputs = Remembered(build_frontend(config), runtime, data, known=known)
            trainer = build_trainer(config, data, runtime, inputs=inputs)
            trainer.fit()
            runs += tables(trainer, data.split.test)["real"]
        patients = np.unique(data.table["PID"].iloc[data.split.test])
        found[length] = Tested(list(patients), np.array(runs))
    rows = {length: one.row() for length, one in found.items()}
    single, grouped = found.values()
    rows["buckets minus single length"] = {"n": "", **grouped.minus(single)}
    train, test = (
        " + ".join(map(str, np.bincount(data.bucket[part], minlength=3)))
        for part in (data.split.train, data.split.test)
    )
    size = f"{train} training and {test} test cycles of up to 2.5 s, up to 5 s and longer; "
    return f"## {name}\n\n{size}{len(patients)} test patients.\n\n{table(rows)}"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; key=value words change the configuration of every run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.buckets")
    parser.add_argument("--icbhi", required=True, metavar="DIR", help="recordings of ICBHI")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=48, help="of the synthetic corpus")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--work", type=Path, default=Path("cache/buckets"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    synthetic = options.work / f"synthetic-{options.patients}"
    write_corpus(synthetic, patients=options.patients, seed=0, event_level=8, traps=False)
    folders = {"Synthetic corpus": str(synthetic), "ICBHI, recordings at hand": options.icbhi}
    common = (options.work, options.seeds, options.words)
    sections = [study(name, folder, *common) for name, folder in folders.items()]
    words = sys.argv[1:] if arguments is None else arguments
    shown = " ".join("DIR" if word == options.icbhi else word for word in words)
    head = f"# Length buckets, {date.today()}\n\n`python -m experiments.buckets {shown}`"
    write_page(options.output, "\n\n".join([head, NOTE, *sections]))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(main())
