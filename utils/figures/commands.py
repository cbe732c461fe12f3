"""One function per figure that `visualize.py` makes: read, measure, draw, write, return paths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.corpora.icbhi import completeness
from data.synthetic.corpus import is_synthetic
from utils.common.errors import UserError
from utils.config.schema import RunConfig
from utils.figures import runs, sources, style
from utils.figures.options import BASELINE, SOFTFILM, Options
from utils.figures.published import OwnResult, read_published, sota_caption, sota_figure
from utils.figures.sources import Evaluation, Trained
from utils.metrics.subgroups import age_group

logger = logging.getLogger(__name__)


def sota(options: Options) -> list[Path]:
    """Published systems, and complete official runs of this repository beside them."""
    table = read_published()
    own = own_results([sources.read_evaluation(folder) for folder in options.runs])
    return options.write(sota_figure(table, own), "icbhi_sota_comparison", sota_caption(table, own))


def own_results(evaluations: Sequence[Evaluation]) -> list[OwnResult]:
    """Runs that differ in the seed alone, as mean and sd; a 4-class run also counts collapsed.

    Raises:
        UserError: a run that can not be compared with published ones.
    """
    rows = []
    for one in evaluations:
        if one.synthetic or one.report["partial"] or one.run.get("split_strategy") != "official":
            raise UserError(
                f"{one.folder} can not stand beside published results: they are on the complete "
                "official split of ICBHI 2017, this run is not; leave it out of --run"
            )
        figures = one.report["metrics"]["chosen"]
        key = (one.run["title"], one.run["selection"])
        task = f"{one.run['n_cls']}-class"
        rows.append([task, *key, "", *(figures[f]["value"] for f in ("sp", "se", "score"))])
        if "collapsed_score" in figures:
            values = (figures[f"collapsed_{f}"]["value"] for f in ("sp", "se", "score"))
            rows.append(["2-class", *key, " *", *values])
    frame = pd.DataFrame(rows, columns=["task", "title", "protocol", "mark", "sp", "se", "score"])
    out = []
    for (task, title, protocol, mark), group in frame.groupby(
        ["task", "title", "protocol", "mark"], sort=False
    ):
        sd = float(group.score.std(ddof=1)) if len(group) > 1 else None
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        means = group[["sp", "se", "score"]].mean()
        out.append(OwnResult(task, f"{title}{mark}{seeds}", *means, sd, protocol))
    return out


def mask_analysis(options: Options) -> list[Path]:
    """SoftFiLM's masks, their controls and effects."""
    flag = "--mask-analysis --checkpoint"
    trained = sources.open_trained(
        options.checkpoint or SOFTFILM, flag, "ast_softfilm", options.data_folder
    )
    sources.require_variant(
        trained, "ast_softfilm", flag, "only SoftFiLM has masks that could be analysed"
    )
    table, split = sources.read_corpus(trained.config)
    return runs.write_masks(options, trained, table.iloc[split.test])


def film_params(options: Options) -> list[Path]:
    """gamma and beta of FiLM, TAFiLM or SoftFiLM."""
    from utils.figures.film import (
        film_statistics,
        heatmap_caption,
        heatmap_figure,
        parameters_caption,
        parameters_figure,
    )

    flag = "--film-params --checkpoint"
    trained = sources.open_trained(
        options.checkpoint or SOFTFILM, flag, "ast_softfilm", options.data_folder
    )
    conditioner = trained.checkpoint.build_model().conditioner
    if not conditioner.conditioned_layers:
        raise UserError(
            f"{trained.path} holds {trained.title}, which has no gamma and beta; give a "
            f"FiLM, TAFiLM or SoftFiLM checkpoint: python visualize.py {flag} {SOFTFILM} "
            f"(trained by {sources.training_command('ast_softfilm')})"
        )
    table, _ = sources.read_corpus(trained.config)
    groupings = {
        "device": table["Device"].fillna("unknown"),
        "site": table["AuscLoc"].fillna("unknown"),
        "age": age_group(table["Age"]),
    }
    metadata = trained.checkpoint.metadata_statistics().transform(table)
    paths = []
    for statistics in film_statistics(conditioner, metadata, groupings):
        suffix = "" if statistics.tokens == "all tokens" else f"_{statistics.tokens.split()[0]}"
        for name, draw, caption in (
            ("", parameters_figure, parameters_caption),
            ("_map", heatmap_figure, heatmap_caption),
        ):
            paths += options.write(
                draw(statistics), f"film_params{name}{suffix.lower()}", caption(statistics),
                trained.notice(),
            )  # fmt: skip
    return paths


def tsne(options: Options) -> list[Path]:
    """Representations of the test cycles by the baseline and by SoftFiLM."""
    from utils.figures import embeddings

    models = [
        sources.open_trained(path or default, f"--tsne {flag}", variant, options.data_folder)
        for path, default, flag, variant in (
            (options.baseline, BASELINE, "--baseline-ckpt", "ast"),
            (options.softfilm, SOFTFILM, "--softfilm-ckpt", "ast_softfilm"),
        )
    ]
    for trained, flag, variant, why in (
        (models[0], "--tsne --baseline-ckpt", "ast", "the baseline is the AST without metadata"),
        (models[1], "--tsne --softfilm-ckpt", "ast_softfilm", "it is compared with the baseline"),
    ):
        sources.require_variant(trained, variant, flag, why)
    tables = [sources.read_corpus(trained.config) for trained in models]
    table, rows = tables[0][0], tables[0][1].test
    if not np.array_equal(rows, tables[1][1].test) or len(table) != len(tables[1][0]):
        raise UserError(
            "the two checkpoints were tested on different cycles, so they can not be compared; "
            "train both on the same data folder with the same dataset.split_strategy"
        )
    if 0 < options.cycles < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, options.cycles, replace=False))
    part = table.iloc[rows]
    labels = {
        "class": np.array(models[0].config.task.classes)[_classes(part, models[0].config)],
        "device": part["Device"].fillna("unknown").to_numpy(),
        "site": part["AuscLoc"].fillna("unknown").to_numpy(),
        "patient": part["PID"].to_numpy(),
    }
    found = {trained.title: _embed(trained, rows) for trained in models}
    maps = {title: embeddings.tsne(vectors) for title, vectors in found.items()}
    measured = {title: embeddings.measure(vectors, labels) for title, vectors in found.items()}
    rules = {trained.checkpoint.selection for trained in models}
    notice = style.Notice(
        protocol="test" if "test" in rules else models[1].checkpoint.selection,
        partial=models[0].checkpoint.partial or models[1].checkpoint.partial,
        synthetic=any(trained.notice().synthetic for trained in models),
        source=" and ".join(trained.notice().source for trained in models),
    )
    text = embeddings.tsne_caption(measured, len(rows))
    return options.write(embeddings.tsne_figure(maps, labels), "tsne", text, notice)


def _classes(part: pd.DataFrame, config: RunConfig) -> np.ndarray:
    task = config.task
    return task.true_classes(task.labels(part["Crackles"].to_numpy(), part["Wheezes"].to_numpy()))


def _embed(trained: Trained, rows: np.ndarray) -> np.ndarray:
    """[N, D]: the head's input for the given rows of the trained model's own corpus."""
    from utils.figures.embeddings import embed_cycles
    from utils.training.assemble import build_data, build_frontend
    from utils.training.device import Runtime

    config = trained.config
    runtime = Runtime(config.training.device, config.training.precision, "false")
    data = build_data(config, trained.checkpoint.metadata_statistics())
    model = trained.checkpoint.build_model().to(runtime.device)
    logger.info("%s: %d cycles on %s", trained.title, len(rows), runtime.device)
    frontend = build_frontend(config).to(runtime.device)
    return embed_cycles(model, data, frontend, runtime, rows, config.dataset.batch_size)


def log_mel(options: Options) -> list[Path]:
    """One cycle of each class; the front end of the checkpoint, or the defaults without one."""
    from utils.figures import spectrograms
    from utils.training.assemble import build_frontend

    config = RunConfig()
    if options.checkpoint:
        trained = sources.open_trained(
            options.checkpoint, "--log-mel --checkpoint", "ast", options.data_folder
        )
        config = trained.config
    elif options.data_folder:
        config.dataset.data_folder = options.data_folder
    else:
        raise UserError("--log-mel reads recordings: name them with --data-folder DIR")
    synthetic = is_synthetic(config.dataset.data_folder)
    table, _ = sources.read_corpus(config)
    audio = config.audio
    mels = spectrograms.log_mels(
        table,
        spectrograms.typical_cycles(table),
        build_frontend(config),
        sample_rate=audio.sample_rate,
        resampler=audio.resampler,
        clip_seconds=audio.clip_seconds,
        mean=audio.mean,
        std=audio.std,
    )
    figure = spectrograms.log_mel_figure(mels, low_freq=audio.low_freq, high_freq=audio.high_freq)
    notice = style.Notice(partial=completeness(table).message, synthetic=synthetic)
    return options.write(figure, "log_mel", spectrograms.LOG_MEL_CAPTION, notice)


FIGURES: dict[str, Callable[[Options], list[Path]]] = {
    "mask_analysis": mask_analysis,
    "tsne": tsne,
    "film_params": film_params,
    "sota": sota,
    "confusion": runs.confusion,
    "operating_curve": runs.operating_curve,
    "reliability": runs.reliability,
    "subgroups": runs.subgroups,
    "learning_curves": runs.learning_curves,
    "log_mel": log_mel,
}
