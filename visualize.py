"""Figures from trained models, finished runs and published results.

    python visualize.py --mask-analysis --checkpoint checkpoints/softfilm_best.pt
    python visualize.py --tsne --baseline-ckpt checkpoints/ast_best.pt \\
        --softfilm-ckpt checkpoints/softfilm_best.pt
    python visualize.py --film-params --checkpoint checkpoints/softfilm_best.pt
    python visualize.py --confusion --operating-curve --reliability --subgroups \\
        --learning-curves --run runs/RUN
    python visualize.py --log-mel --data-folder DIR
    python visualize.py --sota

Several figures may be asked for at once; --all asks for every one. A checkpoint holds its own
configuration and statistics; only the data is needed as well. PNG and PDF go to --output-dir.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.common.cli import command
from utils.common.errors import UserError
from utils.figures.commands import FIGURES, SOFTFILM, Options
from utils.figures.style import FORMATS, Output


def parse(arguments: Sequence[str] | None = None) -> tuple[list[str], Options]:
    """Names of the figures that are asked for, and the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = parser.add_argument_group("figures")
    for name, make in FIGURES.items():
        flag = f"--{name.replace('_', '-')}"
        figures.add_argument(flag, action="store_true", help=make.__doc__.split("\n")[0])
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
    parser.add_argument("--output-dir", type=Path, default=Path("figs"), metavar="DIR")
    parser.add_argument("--formats", nargs="+", choices=("png", "pdf", "svg"), default=FORMATS)
    given = parser.parse_args(arguments)
    names = [name for name in FIGURES if given.all or getattr(given, name)]
    if not names:
        parser.error("which figure? " + ", ".join(f"--{n.replace('_', '-')}" for n in FIGURES))
    return names, Options(
        output=Output(given.output_dir, given.formats),
        checkpoint=given.checkpoint or (SOFTFILM if given.all else None),
        baseline=given.baseline_ckpt,
        softfilm=given.softfilm_ckpt,
        runs=given.run,
        part=given.part,
        data_folder=given.data_folder,
        cycles=given.cycles,
    )


@command
def main() -> None:
    names, options = parse()
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
