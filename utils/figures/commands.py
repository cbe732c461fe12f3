"""One function per figure of `visualize.py`: read, measure, draw, write, return the paths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from data.corpora.icbhi import completeness
from data.synthetic.corpus import is_synthetic
from models.registry import VARIANTS
from utils.common.errors import UserError
from utils.common.readers import read_json, understood
from utils.config.schema import RunConfig
from utils.evaluation.finished_runs import Run, RunGroup, group_runs, read_runs
from utils.evaluation.trained_model import TrainedModel
from utils.figures import compared, runs
from utils.figures.runs import Evaluation, model_notice, read_evaluation
from utils.figures.sota import OwnResult, sota_caption, sota_figure
from utils.figures.style import Notice, Output
from utils.metrics.bootstrap import over_seeds
from utils.metrics.subgroups import age_group
from utils.training.assemble import build_frontend, build_split

logger = logging.getLogger(__name__)

BASELINE, SOFTFILM = "checkpoints/ast_best.pt", "checkpoints/softfilm_best.pt"
#: Training script and configuration of each variant that the repository ships.
SCRIPTS: dict[str, tuple[str, str]] = {
    "ast": ("ast_train.py", "ast_config"),
    "ast_grf": ("ast_meta_fus_train.py", "ast_fus_config"),
    "ast_film": ("ast_film_train.py", "ast_film_config"),
    "ast_tafilm": ("ast_tafilm_train.py", "ast_tafilm_config"),
    "ast_softfilm": ("ast_film_soft.py", "ast_film_soft_config"),
}


@dataclass
class Options:
    """What the command line says; a checkpoint is None where it was not given."""

    output: Output = field(default_factory=Output)
    checkpoint: str | None = None
    baseline: str | None = None
    softfilm: str | None = None
    runs: Sequence[str] = ()
    part: str = "test"
    data_folder: str | None = None
    cycles: int = 0  # at most so many test cycles in the t-SNE; 0: all
    compared: Sequence[str] = ()  # --compare
    grid: str | None = None  # --ablation


def training_command(variant: str) -> str:
    """The command that makes a checkpoint of a variant."""
    script, config = SCRIPTS[variant]
    return f"python {script} --config configs/{config}.yaml --mlflow-config configs/mlflow.yaml"


def open_model(
    path: str | Path, flag: str, variant: str, data_folder: str | None = None
) -> TrainedModel:
    """Open a checkpoint and name it on the console.

    Args:
        flag: command line that needs it, for the message.
        variant: whose training command is named when the file is missing (that of
            <variant>_best.pt when the file has such a name).

    Raises:
        UserError: the file is missing or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        named = [v.name for v in VARIANTS.values() if path.name == f"{v.short}_best.pt"]
        variant = next((name for name in named if name in SCRIPTS), variant)
        raise UserError(
            f"{flag}: there is no checkpoint {path}; train one first: {training_command(variant)}"
        )
    model = TrainedModel.open(path, data_folder=data_folder)
    print(model.headline(), flush=True)
    return model


def require_variant(model: TrainedModel, variant: str, flag: str, why: str) -> None:
    """Refuse a checkpoint of another variant, with the command that works.

    Raises:
        UserError: names what the file holds, why it does not do, and the right commands.
    """
    if model.config.variant != variant:
        right = VARIANTS[variant]
        raise UserError(
            f"{model.path} holds {model.title}; {why}. Give a checkpoint of {right.title}: "
            f"python visualize.py {flag} checkpoints/{right.short}_best.pt (trained by "
            f"{training_command(variant)})"
        )


def each_run(draw: runs.Draw) -> Callable[[Options], list[Path]]:
    """`draw` of every run that is named; several runs have a folder each."""
    flag = f"--{draw.__name__.replace('_', '-')}"

    def command(options: Options) -> list[Path]:
        return [path for one, out in _evaluations(options, flag) for path in draw(one, out)]

    command.__doc__ = draw.__doc__
    return command


def _evaluations(options: Options, flag: str) -> Iterator[tuple[Evaluation, Output]]:
    folders = list(options.runs)
    if not folders and options.checkpoint:
        model = open_model(options.checkpoint, flag, "ast_softfilm")
        folders = [str(Path(model.config.training.output_dir) / model.checkpoint.run)]
    if not folders:
        raise UserError(
            f"{flag} draws a finished run: name its folder with --run DIR (runs/...), or give its "
            "checkpoint with --checkpoint FILE"
        )
    for folder in folders:
        output = options.output
        if len(folders) > 1:
            output = replace(output, folder=output.folder / Path(folder).name)
        one = read_evaluation(folder, options.part)
        print(one.headline(), flush=True)
        yield one, output


def sota(options: Options) -> list[Path]:
    """Published systems, and complete official runs of this repository."""
    own = own_results([read_evaluation(folder) for folder in options.runs])
    return options.output.write(sota_figure(own), "icbhi_sota_comparison", sota_caption(own))


def compare(options: Options) -> list[Path]:
    """Scores of finished runs with intervals, and paired differences to the first one's."""
    return _of_groups(options, read_runs(options.compared), "comparison", _forest)


def ablation(options: Options) -> list[Path]:
    """Score of the finished runs of a grid against what the grid varies."""
    folder = Path(options.grid or "")
    path = folder / "grid.json"
    if not path.is_file():
        raise UserError(
            f"--ablation draws a grid that has run: {path} is missing; name the folder that "
            "python -m utils.runs.grid printed (runs/ablation-...)"
        )
    remedy = "start the grid's command again, which writes it"
    with understood(path, remedy):
        runs = [folder.parent / cell["run"] for cell in read_json(path, remedy)["cells"]]
    there = read_runs([run for run in runs if run.is_dir()])
    if len(there) < len(runs):
        logger.warning(
            "%d of %d cells are finished; the others are left out", len(there), len(runs)
        )
    return _of_groups(options, there, "ablation", _ablation)


Drawn = tuple[Figure, str]


def _of_groups(
    options: Options, found: Sequence[Run], name: str, draw: Callable[[Sequence[RunGroup]], Drawn]
) -> list[Path]:
    """A figure for each protocol and number of classes; they never share one."""
    if not found:
        raise UserError("none of the runs is finished, so there is nothing to draw")
    by_task: dict[tuple, list[RunGroup]] = {}
    for protocol, groups in group_runs(found):
        for group in groups:
            by_task.setdefault((protocol, group.n_cls), []).append(group)
    paths, order = [], {str(run.path): place for place, run in enumerate(found)}
    for number, ((protocol, n_cls), groups) in enumerate(by_task.items(), start=1):
        groups.sort(key=lambda group: min(order[str(run.path)] for run in group.runs))
        figure, text = draw(groups)
        report = groups[0].first.report
        where = f"{n_cls}-class task, split {protocol.split}, {protocol.test_cycles:,} test cycles"
        notice = Notice(protocol.selection, report.partial_message, report.synthetic, report.leaky)
        file = name if len(by_task) == 1 else f"{name}_{n_cls}-class_{protocol.selection}_{number}"
        text = f"{text} {where[0].upper()}{where[1:]} of {protocol.test_patients} patients."
        paths += options.output.write(figure, file, text, notice)
    return paths


def _forest(groups: Sequence[RunGroup]) -> Drawn:
    rows = compared.forest_rows(groups)
    return compared.forest_figure(rows, rows[0].label), (
        "ICBHI Score with 95 % intervals over test patients, of the mean over training seeds, and "
        f"paired differences to {rows[0].label} over the same patients (and over the seeds, where "
        "both have the same ones). Dotted: always normal."
    )


def _ablation(groups: Sequence[RunGroup]) -> Drawn:
    key, series = compared.ablation_series(groups)
    return compared.ablation_figure(key, series), (
        "ICBHI Score with 95 % intervals over test patients, of the mean over training seeds; "
        "within a value side by side. Dotted: always normal."
    )


def own_results(evaluations: Sequence[Evaluation]) -> list[OwnResult]:
    """Runs that differ in the seed alone, as mean and sd; a 4-class run also counts collapsed.

    Raises:
        UserError: a run that cannot be compared with published ones.
    """
    rows = []
    for one in evaluations:
        origin, metrics = one.origin, one.report.metrics["chosen"]
        if one.report.synthetic or one.report.partial or origin.split_strategy != "official":
            raise UserError(
                f"{one.folder} cannot be shown with published results: they are on the complete "
                "official split of ICBHI 2017, this run is not; leave it out of --run"
            )
        for task, mark, prefix in (
            (f"{origin.n_cls}-class", "", ""),
            ("2-class", " *", "collapsed_"),
        ):
            if f"{prefix}score" in metrics:
                values = [metrics[f"{prefix}{name}"].value for name in ("sp", "se", "score")]
                rows.append([task, origin.title, origin.selection, mark, *values])
    keys = ["task", "title", "protocol", "mark"]
    frame = pd.DataFrame(rows, columns=[*keys, "sp", "se", "score"])
    out = []
    for (task, title, protocol, mark), group in frame.groupby(keys, sort=False):
        seeds = over_seeds(group.score)
        several = f", {seeds.n} seeds" if seeds.n > 1 else ""
        sd = seeds.sd if seeds.n > 1 else None
        means = group[["sp", "se", "score"]].mean()
        out.append(OwnResult(task, f"{title}{mark}{several}", *means, sd, protocol))
    return out


def mask_analysis(options: Options) -> list[Path]:
    """SoftFiLM's masks, their controls and effects."""
    flag = "--mask-analysis --checkpoint"
    model = open_model(options.checkpoint or SOFTFILM, flag, "ast_softfilm", options.data_folder)
    require_variant(model, "ast_softfilm", flag, "only SoftFiLM has masks that could be analysed")
    table, split = model.corpus
    return runs.masks(model, table.iloc[split.test], options.output)


def film_params(options: Options) -> list[Path]:
    """gamma and beta of FiLM, TAFiLM or SoftFiLM."""
    from utils.figures import film

    flag = "--film-params --checkpoint"
    model = open_model(options.checkpoint or SOFTFILM, flag, "ast_softfilm", options.data_folder)
    conditioner = model.checkpoint.build_model().conditioner
    if not conditioner.conditioned_layers:
        raise UserError(
            f"{model.path} holds {model.title}, which has no gamma and beta; give a "
            f"FiLM, TAFiLM or SoftFiLM checkpoint: python visualize.py {flag} {SOFTFILM} "
            f"(trained by {training_command('ast_softfilm')})"
        )
    table, split = model.corpus
    table = table.iloc[split.test]
    metadata, known = model.statistics.transform(table), model.statistics
    groupings = {  # as the model knows them: what it was not trained on is unknown
        "device": np.array([*known.devices, "unknown"])[metadata.device],
        "site": np.array([*known.sites, "unknown"])[metadata.site],
        "age": age_group(table["Age"]),
    }
    paths, notice = [], model_notice(model)
    statistics = film.film_statistics(conditioner, metadata, groupings)
    for one, cycles in zip(statistics, film.cycle_means(conditioner, metadata), strict=True):
        tokens = "" if one.tokens == "all tokens" else f"_{one.tokens.split()[0].lower()}"
        for name, figure, caption in (
            ("", film.parameters_figure(one), film.parameters_caption(one)),
            ("_map", film.heatmap_figure(one), film.heatmap_caption(one)),
            ("_cycles", film.distribution_figure(cycles, groupings),
             film.distribution_caption(cycles)),
        ):  # fmt: skip
            paths += options.output.write(figure, f"film_params{name}{tokens}", caption, notice)
    return paths


def tsne(options: Options) -> list[Path]:
    """Representations of the test cycles by the baseline and by SoftFiLM."""
    from utils.figures import embeddings

    models = []
    for path, flag, variant, why in (
        (options.baseline or BASELINE, "--baseline-ckpt", "ast",
         "the baseline is the AST without metadata"),
        (options.softfilm or SOFTFILM, "--softfilm-ckpt", "ast_softfilm",
         "it is compared with the baseline"),
    ):  # fmt: skip
        models.append(open_model(path, f"--tsne {flag}", variant, options.data_folder))
        require_variant(models[-1], variant, f"--tsne {flag}", why)
    (table, split), (other, other_split) = (model.corpus for model in models)
    rows = split.test
    if not np.array_equal(rows, other_split.test) or len(table) != len(other):
        raise UserError(
            "the two checkpoints were tested on different cycles, so they cannot be compared; "
            "train both on the same data folder with the same dataset.split_strategy"
        )
    if 0 < options.cycles < len(rows):
        rows = np.sort(np.random.default_rng(0).choice(rows, options.cycles, replace=False))
    part, task = table.iloc[rows], models[0].task
    classes = task.true_classes(
        task.labels(part["Crackles"].to_numpy(), part["Wheezes"].to_numpy())
    )
    labels = {
        "class": np.array(task.classes)[classes],
        "device": part["Device"].fillna("unknown").to_numpy(),
        "site": part["AuscLoc"].fillna("unknown").to_numpy(),
        "patient": part["PID"].to_numpy(),
    }
    found = {model.title: model.embeddings(rows) for model in models}
    maps = {title: embeddings.tsne(vectors) for title, vectors in found.items()}
    measured = {title: embeddings.measure(vectors, labels) for title, vectors in found.items()}
    notices = [model_notice(model) for model in models]
    notice = Notice(
        protocol=max((model.selection for model in models), key=lambda rule: rule.rank),
        partial=next((one.partial for one in notices if one.partial), ""),
        synthetic=any(one.synthetic for one in notices),
        leaky=any(one.leaky for one in notices),
        source=" and ".join(one.source for one in notices),
    )
    text = embeddings.tsne_caption(measured, len(rows))
    return options.output.write(embeddings.tsne_figure(maps, labels), "tsne", text, notice)


def log_mel(options: Options) -> list[Path]:
    """One cycle of each class; the front end of the checkpoint, or the defaults without one."""
    from utils.figures import spectrograms

    config = RunConfig()
    if options.checkpoint:
        flag = "--log-mel --checkpoint"
        config = open_model(options.checkpoint, flag, "ast", options.data_folder).config
    elif options.data_folder:
        config.dataset.data_folder = options.data_folder
    else:
        raise UserError("--log-mel reads recordings: name them with --data-folder DIR")
    table, _ = build_split(config)
    rows = spectrograms.typical_cycles(table)
    mels = spectrograms.log_mels(table, rows, build_frontend(config), config.audio)
    figure = spectrograms.log_mel_figure(
        mels, low_freq=config.audio.low_freq, high_freq=config.audio.high_freq
    )
    synthetic = is_synthetic(*config.dataset.folders)
    notice = Notice(partial=completeness(table).message, synthetic=synthetic)
    return options.output.write(figure, "log_mel", spectrograms.LOG_MEL_CAPTION, notice)


FIGURES: dict[str, Callable[[Options], list[Path]]] = {
    "mask_analysis": mask_analysis,
    "tsne": tsne,
    "film_params": film_params,
    "sota": sota,
    **{
        draw.__name__: each_run(draw)
        for draw in (*runs.EVALUATION_FIGURES, runs.learning_curves, runs.permutation)
    },
    "log_mel": log_mel,
    "compare": compare,
    "ablation": ablation,
}
