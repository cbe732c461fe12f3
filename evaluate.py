"""Evaluate trained models, or compare them; no configuration is needed, the checkpoint holds it.

    python evaluate.py --checkpoint checkpoints/softfilm_best.pt
    python evaluate.py --checkpoint FILE --data-folder DIR --split val
    python evaluate.py --checkpoint FILE --corpus corpus.yaml
    python evaluate.py --compare checkpoints/ast_best.pt checkpoints/softfilm_best.pt

The report has 95 % intervals over patients, subgroups, calibration, metadata-only baselines and,
for models that see metadata, the metadata permutation test: the same model and sounds with real,
shuffled and unknown metadata. report.json, report.md, predictions.csv and figures/ go to
evaluation/<split>/ in the run's folder, and to the run in MLflow where it was tracked.

--corpus judges the model on any other corpus, named by the section `dataset` of a configuration
file: on its test part, or on all of it where it has none. Audio settings and classes are the
model's; a device or site that it was not trained on is unknown to it.

--compare prints and writes the paired patient bootstrap of each pair on the test part. It takes
the predictions from the runs' folders where they are there, and computes them otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.common.cli import command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="FILE", help="report on this model")
    what.add_argument("--compare", nargs="+", metavar="FILE", help="two models or more")
    parser.add_argument("--data-folder", metavar="DIR", help="instead of the checkpoint's own")
    parser.add_argument("--corpus", metavar="FILE.yaml", help="another corpus to judge it on")
    parser.add_argument(
        "--split", choices=("test", "val", "train", "all"), help="of the data; default: test"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as configured")
    parser.add_argument("--batch-size", type=int, metavar="N", help="cycles per forward pass")
    parser.add_argument(
        "--no-metadata-test", action="store_true", help="leave out its ten further predictions"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of the run's folder")
    options = parser.parse_args(arguments)
    if options.compare and len(options.compare) < 2:
        parser.error("--compare needs two checkpoints or more")
    if options.corpus and (options.compare or options.data_folder):
        parser.error("--corpus goes with --checkpoint, and names its data folder itself")
    if options.corpus and options.split not in (None, "test", "all"):
        parser.error("nothing of --corpus was trained on; --split is test or all")
    if options.compare and options.split not in (None, "test"):
        parser.error("--compare is about the test part; leave --split out")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return options


@command
def main() -> None:
    options = parse()
    from utils.runs.judge import compare_models, evaluate  # torch and all the rest

    if options.checkpoint:
        evaluate(options)
    else:
        compare_models(options)


if __name__ == "__main__":
    raise SystemExit(main())
