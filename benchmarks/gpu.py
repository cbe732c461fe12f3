"""Everything worth knowing on a GPU, measured by one program in less than ten minutes.

    python -m benchmarks.gpu [--output benchmarks/results] [--sections NAME ...] [--minutes 9]
    python -m benchmarks.gpu --device cpu --quick --output FOLDER      (tiny sizes: does it run?)

| section | what | against |
|---|---|---|
| correctness | logits and gradients of every variant, log-mel | float64 on the CPU |
| matmul | large products in bf16, fp32 and TF32: what the card can do | |
| model_step | forward pass, training step; bf16, batches of 64 and 16 | transformers; plain AST |
| memory | largest batch, peak memory by batch | transformers |
| frontend | log-mel and augmentation | torchaudio on the CPU, clip by clip |
| loop | time per batch outside the model; does a step wait for the device | a bare loop |
| frozen_cache | epochs on a frozen backbone with the cache | without it |
| training | a few epochs of every variant, recording to weights | plain AST |

Contestants of a table take turns in one run. Every section has its share of the time left; after
each of its parts `<device>_<date>.json` and `.md` are written anew, so that nothing measured is
lost when time runs out (naming fewer --sections gives each more). A section that fails is recorded
as failed and the others go on; sections of an earlier call on the same device and day, with the
same torch, stay in the files. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu_report import rounded, to_markdown
from benchmarks.gpu_runner import Parts, Results, Setting, describe, measure
from utils.common.cli import command
from utils.common.errors import UserError

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Section:
    """A part of the program. `function` gives (name, figures) one after the other, the most
    important first: what does not fit into its time is left out.

    Attributes:
        module, function: where it lies.
        needs: modules that it imports when its turn comes, so that a missing package stops no
            other section.
        share: of the time, in seconds when all sections have nine minutes; what one leaves goes
            to those behind it.
    """

    module: str
    function: str
    needs: tuple[str, ...]
    share: float

    def load(self) -> None:
        """Import everything: on a fresh machine that may take longer than measuring."""
        for module in (self.module, *self.needs):
            import_module(module)

    def run(self, setting: Setting) -> Parts:
        return getattr(import_module(self.module), self.function)(setting)


_MODEL, _LOOP = ("benchmarks.model_step",), ("benchmarks.loop_overhead", "utils.runs.run")
SECTIONS = {
    "matmul": Section("benchmarks.gpu_model", "matmul", _MODEL, 20),
    "correctness": Section("benchmarks.gpu_model", "correctness", _MODEL, 60),
    "model_step": Section("benchmarks.gpu_model", "model_step", _MODEL, 180),
    "frontend": Section("benchmarks.gpu_data", "frontend", ("benchmarks.frontend",), 30),
    "loop": Section("benchmarks.gpu_data", "loop", _LOOP, 30),
    "memory": Section("benchmarks.gpu_model", "memory", _MODEL, 45),
    "frozen_cache": Section(
        "benchmarks.gpu_data", "frozen_cache", ("benchmarks.frozen_cache",), 35
    ),
    "training": Section("benchmarks.gpu_data", "training", _LOOP, 140),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, refused where nothing could be measured or figures would mislead."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections together")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device was found, so there is nothing to measure; to see that the program "
            "runs: python -m benchmarks.gpu --device cpu --quick --output FOLDER"
        )
    if options.device == "cpu" and not options.quick:
        raise UserError("--device cpu is for a look at tiny sizes: add --quick")
    if options.quick and options.output is None:
        raise UserError("figures of --quick mean nothing; name a folder for them with --output")
    options.output = options.output or RESULTS
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure section after section."""
    given = sys.argv[1:] if arguments is None else arguments
    options, began = parse(arguments), time.monotonic()
    words = " ".join(["python -m benchmarks.gpu", *given])
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(options.device, options.quick, Path(name))
        results = Results(options.output, describe(setting))
        for number, section_name in enumerate(options.sections):
            section = SECTIONS[section_name]
            with suppress(Exception):  # `measure` meets the same and records it
                section.load()
            shares = sum(SECTIONS[later].share for later in options.sections[number:])
            left = 60 * options.minutes - (time.monotonic() - began)
            seconds = left * section.share / shares
            logger.info("%s: at most %.0f s", section_name, seconds)
            record = results.record(section_name, words)
            measure(section.run, setting, seconds, record, results.save)
            logger.info("%s: %s %s", section_name, record["status"], record["message"])
    content = rounded(results.content)
    print(to_markdown(content))
    if results.path.is_file():
        print(f"Written: {results.path} and .md")
    print(json.dumps(content))


if __name__ == "__main__":
    sys.exit(command(main)())
