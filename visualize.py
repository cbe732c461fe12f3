"""Figures from trained models, finished runs and published results.

    python visualize.py --mask-analysis --checkpoint checkpoints/softfilm_best.pt
    python visualize.py --tsne --baseline-ckpt checkpoints/ast_best.pt \\
        --softfilm-ckpt checkpoints/softfilm_best.pt
    python visualize.py --film-params --checkpoint checkpoints/softfilm_best.pt
    python visualize.py --confusion --operating-curve --reliability --subgroups \\
        --learning-curves --run runs/RUN
    python visualize.py --permutation --run runs/RUN
    python visualize.py --compare runs/*
    python visualize.py --ablation runs/ablation-GRID
    python visualize.py --log-mel --data-folder DIR
    python visualize.py --sota

Several figures may be asked for at once; --all asks for every one that needs no list of runs. A
checkpoint holds its own configuration and statistics; only the data is needed as well. PNG and PDF
go to --output-dir. --caption off or file gives a figure for a paper; marks such as SYNTHETIC stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.common.cli import command
from utils.common.errors import UserError

#: Functions of `utils.figures.commands`, which imports torch and all the rest.
FIGURES = {
    "mask_analysis": "SoftFiLM's masks, their controls and effects",
    "tsne": "representations of the test cycles by the baseline and by SoftFiLM",
    "film_params": "gamma and beta of FiLM, TAFiLM or SoftFiLM",
    "sota": "published systems, and complete official runs of this repository",
    "confusion": "confusion matrix at the thresholds in use",
    "operating_curve": "Se against Sp, normal against anything abnormal, and the points in use",
    "reliability": "observed share against predicted probability",
    "subgroups": "Sp, Se and Score by device, site, sex, age and whether the BMI is known",
    "learning_curves": "loss, Score and learning rate against the epoch",
    "permutation": "Score with real, shuffled and unknown metadata, after evaluate.py",
    "log_mel": "one cycle of each class; the front end of the checkpoint, or the default one",
}


def parse(arguments: Sequence[str] | None = None) -> tuple[list[str], argparse.Namespace]:
    """Names of the figures that are asked for, and the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = parser.add_argument_group("figures")
    for name, text in FIGURES.items():
        figures.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    figures.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR",
        help="Scores of finished runs, and paired differences to the first",
    )  # fmt: skip
    figures.add_argument(
        "--ablation", metavar="DIR", help="Score against what a grid varies; the grid's folder"
    )
    figures.add_argument("--all", action="store_true", help="every figure; says which lack input")
    source = parser.add_argument_group("input")
    source.add_argument("--checkpoint", metavar="FILE", help="a trained model")
    source.add_argument("--baseline-ckpt", metavar="FILE", help="t-SNE: a plain AST")
    source.add_argument("--softfilm-ckpt", metavar="FILE", help="t-SNE: a SoftFiLM-AST")
    source.add_argument("--run", nargs="+", default=[], metavar="DIR", help="finished run(s)")
    source.add_argument("--part", choices=("test", "val"), default="test", help="part of the run")
    source.add_argument("--data-folder", metavar="DIR", help="instead of the checkpoint's own")
    source.add_argument(
        "--cycles", type=int, default=0, metavar="N", help="t-SNE of N random test cycles only"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/figures"), metavar="DIR")
    parser.add_argument(
        "--formats", nargs="+", choices=("png", "pdf", "svg"), default=("png", "pdf")
    )
    parser.add_argument(
        "--caption", choices=("below", "off", "file"), default="below",
        help="in the figure, nowhere, or in a text file next to it",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    names = [name for name in FIGURES if given.all or getattr(given, name)]
    names += [name for name in ("compare", "ablation") if getattr(given, name)]
    if not names:
        every = (*FIGURES, "compare", "ablation")
        parser.error("which figure? " + ", ".join(f"--{name.replace('_', '-')}" for name in every))
    return names, given


@command
def main() -> None:
    names, given = parse()
    from utils.figures.commands import FIGURES, SOFTFILM, Options
    from utils.figures.style import Output

    options = Options(
        output=Output(given.output_dir, given.formats, given.caption),
        checkpoint=given.checkpoint or (SOFTFILM if given.all else None),
        baseline=given.baseline_ckpt,
        softfilm=given.softfilm_ckpt,
        runs=given.run,
        part=given.part,
        data_folder=given.data_folder,
        cycles=given.cycles,
        compared=given.compare,
        grid=given.ablation,
    )
    failures = []
    for name in names:
        try:
            for path in FIGURES[name](options):
                print(path)
        except UserError as error:
            if len(names) == 1:
                raise
            failures.append(str(error))
    if failures:
        raise UserError("not every figure could be made\n" + "\n".join(failures))


if __name__ == "__main__":
    raise SystemExit(main())
