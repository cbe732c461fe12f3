"""Another hospital: models of ICBHI judged on SPRSound, and the other way round.

    python -m experiments.transfer --icbhi DIR --sprsound DIR [--seeds 3] [--output FILE]

The plain AST and SoftFiLM-AST are trained on each corpus without the patients of its held-out part,
and judged on that part and on the other corpus, as `evaluate.py --corpus` does it: on its official
test part, or on the whole where it has none; with the metadata that the corpus has and with none.
The configuration is transfer.yaml. A model that lies in the work folder is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from data.task import FIELDS
from experiments.spectrograms import write_result
from models.registry import VARIANTS
from utils.common.cli import command
from utils.common.files import write_text
from utils.config.schema import RunConfig, load_config
from utils.evaluation.render import markdown_table, number, with_interval
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.bootstrap import over_seeds, patient_bootstrap, patient_tables
from utils.training.assemble import build_data, build_trainer, describe_run
from utils.training.checkpoint import save_checkpoint
from utils.training.device import Runtime

SETTINGS = Path(__file__).with_suffix(".yaml")
OUTPUT = Path(__file__).parent / "results" / "transfer.md"
NAMES = {"icbhi": "ICBHI", "sprsound": "SPRSound"}
METADATA = ("real", "unknown")
HEAD = ["trained on", "judged on", "model", "metadata", "Sp", "Se", "Score", "AUROC"]


def configure(variant: str, name: str, folder: str, work: Path, seed: int) -> RunConfig:
    """Checked configuration of one run."""
    words = [f"dataset.name={name}", f"dataset.data_folder={folder}", f"training.seed={seed}"]
    return load_config([SETTINGS], [*words, f"dataset.cache_dir={work / 'cache'}"], variant=variant)


def trained(config: RunConfig, path: Path) -> Path:
    """The checkpoint of a run, trained if it is not there."""
    if not path.is_file():
        data = build_data(config)
        trainer = build_trainer(config, data, Runtime("cpu", "fp32", "false"))
        trainer.fit()
        save_checkpoint(path, trainer.checkpoint(describe_run(config, data)))
    return path


def judge(model: TrainedModel) -> dict[str, tuple[np.ndarray, float]]:
    """Metadata (real, unknown) -> confusion matrix of each patient [P, 2, 2], AUROC."""
    rows, task = model.rows(model.default_part()), model.task
    table, real = model.data.table.iloc[rows], model.data.metadata[torch.from_numpy(rows)]
    label = model.data.label[rows]
    given = [real, real.without(*FIELDS)] if model.is_conditioned else [real]
    out = {}
    for name, logits in zip(METADATA, model.predictor.under(rows, given), strict=False):
        probability = task.probabilities(logits)
        predicted = task.predicted_classes(probability, model.thresholds)
        _, tables = patient_tables(task.true_classes(label), predicted, table["PID"], 2)
        out[name] = tables, roc_auc_score(label[:, 0], probability[:, 0])
    return out


def study(folders: dict[str, str], seeds: int, work: Path) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what each corpus holds."""
    files = {name: work / f"{name}.yaml" for name in folders}
    for name, folder in folders.items():
        skip = "on_bad_recording: skip, store_workers: 1"
        section = f"{{name: {name}, data_folder: {folder}, cache_dir: {work / 'cache'}, {skip}}}"
        write_text(files[name], f"dataset: {section}\n")
    rows, sizes = [], {}
    for source, target in (("icbhi", "sprsound"), ("sprsound", "icbhi")):
        for variant in ("ast", "ast_softfilm"):
            found: dict[tuple[str, str], list] = {}
            for seed in range(seeds):
                config = configure(variant, source, folders[source], work, seed)
                path = trained(config, work / f"{source}-{variant}-s{seed}.pt")
                own = TrainedModel.open(path)
                other = TrainedModel.open(path, corpus_file=files[target])
                part = "whole" if other.default_part() == "all" else "official test part"
                places = f"{NAMES[source]}, held out", f"{NAMES[target]}, {part}"
                for place, model in zip(places, (own, other), strict=True):
                    for metadata, result in judge(model).items():
                        found.setdefault((place, metadata), []).append(result)
                    sizes[place] = _size(model)
                sizes[f"{NAMES[source]}, trained on"] = _size(own, "train")
            for (place, metadata), results in found.items():
                shown = metadata if variant != "ast" else "none"
                rows.append(
                    [NAMES[source], place, VARIANTS[variant].title, shown, *_cells(results)]
                )
    return rows, [f"{place}: {size}" for place, size in sorted(sizes.items())]


def _size(model: TrainedModel, part: str | None = None) -> str:
    rows = model.rows(part or model.default_part())
    abnormal, table = int(model.data.label[rows, 0].sum()), model.data.table.iloc[rows]
    return f"{len(rows)} cycles ({abnormal} abnormal) of {table['PID'].nunique()} patients"


def _cells(results: Sequence[tuple[np.ndarray, float]]) -> list[str]:
    metrics = patient_bootstrap(np.stack([tables for tables, _ in results]))
    scores = over_seeds([area for _, area in results])
    area = f"{number(scores.mean, 3)} ± {number(scores.sd, 3)}"
    return [*(with_interval(metrics[key], 1) for key in ("sp", "se", "score")), area]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge, write the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.transfer", description=__doc__)
    parser.add_argument("--icbhi", required=True, metavar="DIR")
    parser.add_argument("--sprsound", required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--work", type=Path, default=Path("runs/transfer"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    options = parser.parse_args(arguments)
    folders = {"icbhi": options.icbhi, "sprsound": options.sprsound}
    rows, sizes = study(folders, options.seeds, options.work)
    lines = [
        "# Transfer to another hospital", "",
        f"`python -m experiments.transfer --icbhi DIR --sprsound DIR --seeds {options.seeds}`, "
        f"{date.today()}.", "",
        *(f"- {size}" for size in sizes), "",
        "Two classes; percent, mean over seeds with 95 % intervals over patients of what is judged "
        "on; AUROC of abnormal, mean ± sd over seeds. Thresholds are 0.5; always normal scores 50.",
        "", *markdown_table(HEAD, rows),
    ]  # fmt: skip
    write_result(options.output, lines)


if __name__ == "__main__":
    sys.exit(main())
