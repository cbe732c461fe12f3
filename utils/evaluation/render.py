"""Reports of `utils.evaluation.report` as Markdown, and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.metrics.protocol import SYNTHETIC_NOTE, caption

#: Figures of the first table: name -> heading.
HEADLINE = {
    "sp": "Sp",
    "se": "Se",
    "score": "Score",
    "collapsed_sp": "Sp, collapsed to 2 classes",
    "collapsed_se": "Se, collapsed to 2 classes",
    "collapsed_score": "Score, collapsed to 2 classes",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
}


#: Stands where there is no figure.
NOTHING = "–"


def number(value: float | None, decimals: int = 2) -> str:
    """A figure, or a dash where it is undefined."""
    if value is None:
        return NOTHING
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # rounding leaves no sign to read


def with_interval(figure: Mapping[str, Any], decimals: int = 2) -> str:
    """`value [low, high]`; the value alone where there is no interval."""
    text = number(figure["value"], decimals)
    if figure["low"] is None:
        return text
    return f"{text} [{number(figure['low'], decimals)}, {number(figure['high'], decimals)}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table followed by an empty one."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def counts_line(counts: Mapping[str, int]) -> str:
    """`2,756 cycles, 381 recordings, 49 patients (normal 1,579, ...)`."""
    places = ("cycles", "recordings", "patients")
    whole = ", ".join(f"{counts[name]:,} {name}" for name in places)
    classes = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name not in places)
    return f"{whole} ({classes})"


def thresholds_line(thresholds: Sequence[float] | None) -> str:
    """`.50, .31`, or the rule that needs none."""
    if thresholds is None:
        return "those of each fold"
    return ", ".join(f"{t:.2f}" for t in thresholds) if thresholds else "largest probability"


def to_markdown(report: Mapping[str, Any], title: str = "Evaluation") -> str:
    """The whole report; every table carries the selection rule and whether data are partial."""

    def heading(text: str) -> list[str]:
        return [f"**{_marked(text, report)}**", ""]

    lines = [f"# {title}", "", report["protocol"]["statement"], ""]
    for note in [*_warnings(report), *report.get("notes", [])]:
        lines += [f"**{note}**", ""]
    if "run" in report:
        lines += [
            f"Run `{report['run']}`: {report['title']}, {report['n_cls']}-class, split "
            f"`{report['split_strategy']}`, seed {report['seed']}, epoch {report['epoch'] + 1}.",
            "",
        ]
    lines += [f"Data: {counts_line(report['counts'])}.", ""]
    lines += heading(
        "Figures with 95 % intervals; Sp, Se, Score in percent, bootstrap over "
        f"{report['counts']['patients']} patients"
    )
    lines += _figures(report)
    lines += heading("Per class, at the chosen thresholds") + _per_class(report)
    lines += heading("Confusion matrix at the chosen thresholds, cycles") + _confusion(report)
    lines += heading("Subgroups at the chosen thresholds; no rate on fewer than ten cycles")
    lines += _subgroups(report)
    lines += heading("Calibration, equal-mass bins") + _calibration(report)
    if report.get("floors"):
        lines += heading("Floors: models that hear nothing") + _floors(report)
    if report.get("metadata_test"):
        lines += heading("Is it the sound? The same model with other metadata")
        lines += _metadata_test(report)
    if report.get("controls"):
        lines += heading("Masks: overlap as trained, and without data (docs/protocol.md)")
        rows = [(key.split("/")[-1], number(v, 4)) for key, v in report["controls"].items()]
        lines += markdown_table(["", "value"], rows)
    return "\n".join(lines).rstrip() + "\n"


def _marked(text: str, report: Mapping[str, Any]) -> str:
    selection = report["protocol"]["selection"]
    return caption(text, selection, report["partial"], report["synthetic"])


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What forbids to read the figures as results on the whole database."""
    synthetic = [SYNTHETIC_NOTE] if report["synthetic"] else []
    return synthetic + ([report["partial_message"]] if report["partial"] else [])


def _figures(report) -> list[str]:
    rules = report["thresholds"]
    head = ["", *(f"{name}: {thresholds_line(rule)}" for name, rule in rules.items())]
    figures = report["metrics"]
    rows = [
        [text, *(with_interval(figures[rule][name], 2 if name in _PERCENT else 3)
                 for rule in rules)]
        for name, text in HEADLINE.items()
        if name in figures["chosen"]
    ]  # fmt: skip
    for name in figures["chosen"]:
        if name.startswith(("auroc_", "ap_")):
            kind, output = name.split("_", 1)
            text = f"{'AUROC' if kind == 'auroc' else 'Average precision'}, {output}"
            rows.append([text, *(with_interval(figures[rule][name], 3) for rule in rules)])
    return markdown_table(head, rows)


_PERCENT = {name for name in HEADLINE if name not in ("accuracy", "macro_f1")}


def _per_class(report) -> list[str]:
    figures, counts = report["metrics"]["chosen"], report["counts"]
    kinds = ("precision", "recall", "f1")
    rows = [
        [name, counts[name], *(with_interval(figures[f"{kind}_{name}"], 3) for kind in kinds)]
        for name in report["task"]["classes"]
    ]
    return markdown_table(["class", "cycles", "precision", "recall", "F1"], rows)


def _confusion(report) -> list[str]:
    classes, counts = report["confusion"]["classes"], report["confusion"]["chosen"]
    head = ["truth \\ prediction", *classes]
    return markdown_table(head, [[name, *row] for name, row in zip(classes, counts, strict=True)])


def _subgroups(report) -> list[str]:
    head = ["group", "", "patients", "cycles", "normal", "abnormal", "Sp", "Se", "Score"]
    rows = [
        [row["group"], row["value"], row["patients"], row["cycles"], row["normal"],
         row["abnormal"], *(number(row[name], 1) for name in ("sp", "se", "score"))]
        for row in report["subgroups"]
    ]  # fmt: skip
    return markdown_table(head, rows)


def _calibration(report) -> list[str]:
    names = {
        "as_trained": "as trained",
        "without_pos_weight": "pos_weight undone",
        "platt": "slope and intercept from validation",
    }
    rows = [
        [output, names[kind], number(entry["prevalence"], 3),
         number(entry[kind]["ece"], 3), number(entry[kind]["brier"], 3)]
        for output, entry in report["calibration"].items()
        for kind in names
        if kind in entry
    ]  # fmt: skip
    return markdown_table(["output", "probability", "prevalence", "ECE", "Brier"], rows)


def _floors(report) -> list[str]:
    rows = [
        [name, *(with_interval(floor["metrics"]["chosen"][f]) for f in ("sp", "se", "score")),
         number(floor["metrics"]["chosen"].get("collapsed_score", {}).get("value"))]
        for name, floor in report["floors"].items()
    ]  # fmt: skip
    return markdown_table(["floor", "Sp", "Se", "Score", "collapsed Score"], rows)


def _metadata_test(report) -> list[str]:
    rows = [
        [row["metadata"], number(row["sp"]), number(row["se"]), number(row["score"]),
         with_interval(row["difference"]), number(row["difference"]["p"], 3)]
        for row in report["metadata_test"]
    ]  # fmt: skip
    head = ["metadata", "Sp", "Se", "Score", "Score minus real [95 %]", "p"]
    return markdown_table(head, rows)


_SPLIT_LIMITS = {
    "official": (
        "- Patients 156 and 218 are in both halves of the official split (120 of 2,756 test "
        "cycles of the whole database).",
    ),
    "foldwise": ("- The test part is one of five patient-wise folds, not the official half.",),
    "random": ("- The test part is a patient-wise random draw, not the official half.",),
}


def model_card(
    report: Mapping[str, Any],
    *,
    training_counts: Mapping[str, Mapping[str, int]],
    initial_weights: str = "audioset",
) -> str:
    """Model card to stand beside a checkpoint (M. Mitchell et al., "Model cards for model
    reporting", FAT* 2019): data, protocol, figures, floors, subgroups, limits.

    Args:
        report: of the test part, with what the run says of itself (`run`, `variant`, `title`,
            `n_cls`, `split_strategy`, `seed`, `epoch`, `revision`) and the floors.
        training_counts: cycles, recordings, patients and classes of `train` and `val`.
    """
    task, counts, split = report["task"], report["counts"], report["split_strategy"]
    parts = {"Training": training_counts["train"], "Validation": training_counts["val"]}
    parts = {name: part for name, part in parts.items() if part["cycles"]} | {"Test": counts}
    corpus = (
        "synthetic recordings in the layout of ICBHI 2017"
        if report["synthetic"]
        else "ICBHI 2017 Respiratory Sound Database (Rocha et al., Physiol. Meas. 40 (2019) 035001)"
    )
    lines = [
        f"# Model card: {report['title']}",
        "",
        "**For research only. Not a medical device; not to be used for any decision about a "
        "person's health.**",
        "",
        f"- **Model**: {report['title']} (`{report['variant']}`), {task['n_cls']}-class task with "
        f"outputs {', '.join(task['outputs'])}; initial weights: {initial_weights}; seed "
        f"{report['seed']}, epoch {report['epoch'] + 1}; run `{report['run']}`, code revision "
        f"`{report['revision']}`.",
        f"- **Data**: {corpus}, split `{split}`. "
        + " ".join(f"{name}: {counts_line(part)}." for name, part in parts.items()),
        f"- **Protocol**: `{report['protocol']['selection']}`. {report['protocol']['statement']}",
        f"- **Decision**: thresholds {thresholds_line(report['thresholds']['chosen'])}.",
        *(f"- **{warning}**" for warning in _warnings(report)),
        "",
        "## Figures",
        "",
        f"**{_marked('Test part, percent with 95 % intervals over patients', report)}**",
        "",
        *_card_figures(report),
        "## Subgroups",
        "",
        f"**{_marked('At the chosen thresholds; no rate on fewer than ten cycles', report)}**",
        "",
        *_subgroups(report),
        "## Limits",
        "",
        "- The intervals hold for patients like those of the test part, recorded as they were; "
        f"{counts['patients']} patients can not show differences of one or two points.",
        "- Device, site, age and body mass index nearly identify a patient in this database; "
        "a model that sees them can learn the patient instead of the sound. See the metadata test "
        "and the floors in the evaluation report.",
        *_SPLIT_LIMITS.get(split, ()),
        "- Annotations come from few experts; their disagreement is not in these intervals.",
        "- The outputs are no calibrated probabilities (the loss and its weighting of positives "
        "shift them); see the calibration in the evaluation report before reading them as such.",
        "- Other devices, sites, ages and diseases than those above were not tested.",
    ]
    return "\n".join(lines) + "\n"


def _card_figures(report) -> list[str]:
    """The model at both rules of decision, above the floors."""
    floors = report.get("floors", {})
    models = {
        f"this model, {rule}: {thresholds_line(report['thresholds'][rule])}": figures
        for rule, figures in report["metrics"].items()
    }
    models |= {f"floor: {name}": floor["metrics"]["chosen"] for name, floor in floors.items()}
    shown = [key for key in HEADLINE if key in _PERCENT and key in report["metrics"]["chosen"]]
    rows = [
        [name, *(with_interval(figures[key], 1) for key in shown)]
        for name, figures in models.items()
    ]
    return markdown_table(["", *(HEADLINE[name] for name in shown)], rows)
