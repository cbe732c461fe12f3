"""Reports of `utils.evaluation.report` as Markdown, and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.evaluation.report import Report
from utils.metrics.bootstrap import Interval
from utils.metrics.protocol import caption, warnings

RATES = ("sp", "se", "score")
#: Metrics of the first table: name -> heading.
HEADLINE = {
    "sp": "Sp",
    "se": "Se",
    "score": "Score",
    "auroc_macro": "Macro AUROC",
    "collapsed_sp": "Sp, collapsed to 2 classes",
    "collapsed_se": "Se, collapsed to 2 classes",
    "collapsed_score": "Score, collapsed to 2 classes",
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
}


#: Written where there is no value.
NOTHING = "–"
#: Written for an AUROC or average precision that is not defined.
UNDEFINED = "undefined (one class only)"


def number(value: float | None, decimals: int = 2) -> str:
    """A value, or a dash where it is undefined."""
    if value is None or math.isnan(value):
        return NOTHING
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # rounding leaves no sign to read


def with_interval(figure: Interval, decimals: int = 2) -> str:
    """`value [low, high]`; the value alone where there is no interval."""
    value, low, high = (number(v, decimals) for v in (figure.value, figure.low, figure.high))
    return value if low == NOTHING else f"{value} [{low}, {high}]"


def shown(name: str, figure: Interval, decimals: int = 2) -> str:
    """A metric with its interval: percentages with so many decimals, others with three."""
    if name.startswith(("auroc", "ap_")) and math.isnan(figure.value):
        return UNDEFINED
    return with_interval(figure, decimals if name in _PERCENT else 3)


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
    """`0.50, 0.31`, or the rule that needs none."""
    if thresholds is None:
        return "those of each fold"
    return ", ".join(f"{t:.2f}" for t in thresholds) if thresholds else "largest probability"


def to_markdown(report: Report, title: str = "Evaluation") -> str:
    """The whole report; every table carries the selection rule and whether data are partial."""
    lines = [f"# {title}", "", report.protocol["statement"], ""]
    for note in [*_warnings(report), *(report.notes or [])]:
        lines += [f"**{note}**", ""]
    if one := report.origin:
        lines += [
            f"Run `{one.run}`: {one.title}, {one.n_cls}-class, split `{one.split_strategy}`, "
            f"seed {one.seed}, epoch {one.epoch + 1}.",
            "",
        ]
    lines += [f"Data: {counts_line(report.counts)}.", ""]
    patients = report.counts["patients"]
    sections = {
        "Metrics with 95 % intervals; Sp, Se, Score in percent, bootstrap over "
        f"{patients} patients": _metrics,
        "Per class, at the chosen thresholds": _per_class,
        "Confusion matrix at the chosen thresholds, cycles": _confusion,
        "Subgroups at the chosen thresholds; no rate on fewer than ten cycles": _subgroups,
        "Calibration, equal-mass bins": _calibration,
    }
    if report.baselines:
        sections["Metadata-only baselines: models that see no audio"] = _baselines
    if report.metadata_test:
        sections["Metadata permutation test: the same model with other metadata"] = _metadata_test
    if report.metadata_carry:
        sections["What the metadata carry: information about the label in each part"] = _carry
        text = "Score of the metadata-only baselines on each part (training: on what they learned)"
        sections[text] = _carry_baselines
    if report.metadata_test and report.metadata_test[0].get("devices"):
        text = "Score by device with real, shuffled and unknown metadata; intervals over patients"
        sections[text] = _devices
    if report.controls:
        sections["Masks: overlap as trained, and without data (docs/protocol.md)"] = _controls
    for heading, section in sections.items():
        lines += [f"**{_marked(heading, report)}**", "", *section(report)]
    return "\n".join(lines).rstrip() + "\n"


def _marked(text: str, report: Report) -> str:
    marks = report.partial, report.synthetic, report.leaky
    return caption(text, report.protocol["selection"], *marks)


def _warnings(report: Report) -> list[str]:
    return warnings(report.partial_message, report.synthetic, report.leaky)


def _metrics(report: Report) -> list[str]:
    rules, metrics = report.thresholds, report.metrics
    names = {name: text for name, text in HEADLINE.items() if name in metrics["chosen"]}
    for name in metrics["chosen"]:
        kind, _, output = name.partition("_")
        if kind in ("auroc", "ap") and name not in names:
            names[name] = f"{'AUROC' if kind == 'auroc' else 'Average precision'}, {output}"
    rows = [
        [text, *(shown(name, metrics[rule][name]) for rule in rules)]
        for name, text in names.items()
    ]
    head = ["", *(f"{name}: {thresholds_line(rule)}" for name, rule in rules.items())]
    return markdown_table(head, rows)


_PERCENT = {name for name in HEADLINE if name not in ("accuracy", "macro_f1", "auroc_macro")}


def _per_class(report: Report) -> list[str]:
    metrics, kinds = report.metrics["chosen"], ("precision", "recall", "f1")
    rows = [
        [name, report.counts[name],
         *(with_interval(metrics[f"{kind}_{name}"], 3) for kind in kinds)]
        for name in report.task["classes"]
    ]  # fmt: skip
    return markdown_table(["class", "cycles", "precision", "recall", "F1"], rows)


def _confusion(report: Report) -> list[str]:
    classes, counts = report.confusion["classes"], report.confusion["chosen"]
    head = ["truth \\ prediction", *classes]
    return markdown_table(head, [[name, *row] for name, row in zip(classes, counts, strict=True)])


def _subgroups(report: Report) -> list[str]:
    head = ["group", "", "patients", "cycles", "normal", "abnormal", "Sp", "Se", "Score"]
    whole, rates = ("group", "value", "patients", "cycles", "normal", "abnormal"), RATES
    rows = [
        [*(row[name] for name in whole), *(number(row[name], 1) for name in rates)]
        for row in report.subgroups
    ]
    return markdown_table(head, rows)


def _calibration(report: Report) -> list[str]:
    names = {
        "as_trained": "as trained",
        "without_pos_weight": "pos_weight undone",
        "platt": "slope and intercept from validation",
    }
    rows = [
        [output, names[kind], number(entry["prevalence"], 3),
         number(entry[kind]["ece"], 3), number(entry[kind]["brier"], 3)]
        for output, entry in report.calibration.items()
        for kind in names
        if kind in entry
    ]  # fmt: skip
    return markdown_table(["output", "probability", "prevalence", "ECE", "Brier"], rows)


def _baselines(report: Report) -> list[str]:
    rows = []
    for name, baseline in report.baselines.items():
        chosen = baseline.metrics["chosen"]
        collapsed = chosen["collapsed_score"].value if "collapsed_score" in chosen else None
        auroc = [shown(f, chosen[f]) for f in ("auroc_macro",) if f in chosen] or [NOTHING]
        rates = (with_interval(chosen[f]) for f in RATES)
        rows.append([name, *rates, *auroc, number(collapsed)])
    head = ["baseline", "Sp", "Se", "Score", HEADLINE["auroc_macro"], "collapsed Score"]
    return markdown_table(head, rows)


def _metadata_test(report: Report) -> list[str]:
    rows = [
        [row["metadata"], *(number(row[name]) for name in RATES),
         with_interval(row["difference"]), number(row["difference"].p, 3)]
        for row in report.metadata_test
    ]  # fmt: skip
    head = ["metadata", "Sp", "Se", "Score", "Score minus real [95 %]", "p"]
    return markdown_table(head, rows)


def _carry(report: Report) -> list[str]:
    rows = [
        [row["field"], row["part"], f"{row['cycles']:,}",
         *(number(row[key], 4) for key in ("bits", "expected", "excess")), number(row["p"], 3)]
        for row in report.metadata_carry["information"]
    ]  # fmt: skip
    head = ["field", "part", "cycles", "mutual information, bit", "by chance", "excess", "p"]
    return [
        *markdown_table(head, rows)[:-1],
        "",
        "By chance: mean over 200 permutations of the field among patients (site: recordings, "
        "duration: cycles); p: share of these that reach the estimate.",
        "",
    ]


def _carry_baselines(report: Report) -> list[str]:
    found = report.metadata_carry["baselines"]
    parts = list(dict.fromkeys(row["part"] for row in found))
    scores = {(row["baseline"], row["part"]): Interval(**_numbers(row["score"])) for row in found}
    names = dict.fromkeys(row["baseline"] for row in found)
    rows = [[name, *(with_interval(scores[name, part], 1) for part in parts)] for name in names]
    return markdown_table(["baseline", *parts], rows)


def _devices(report: Report) -> list[str]:
    found = {r["metadata"]: r["devices"] for r in report.metadata_test if r.get("devices")}
    rows = []
    for device, one in next(iter(found.values())).items():
        cells = (_numbers(devices[device]) for devices in found.values())
        scores = (Interval(v["score"], v["low"], v["high"]) for v in cells)
        rows.append(
            [device, one["patients"], one["cycles"], *(with_interval(s, 1) for s in scores)]
        )
    return markdown_table(["device", "patients", "cycles", *found], rows)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """With NaN for what JSON has as null."""
    return {key: math.nan if value is None else value for key, value in values.items()}


def _controls(report: Report) -> list[str]:
    rows = [(key.split("/")[-1], number(v, 4)) for key, v in report.controls.items()]
    return markdown_table(["", "value"], rows)


_SPLIT_LIMITS = {
    "foldwise": "- The test part is one of five patient-wise folds, not the official half.",
    "random": "- The test part is a patient-wise random draw, not the official half.",
    "leave_device_out": "- The test part is one device's recordings, not the official half; no "
    "other recording of its patients was heard in training.",
    "training_half": "- The test part is a patient-wise draw of the official training half; the "
    "official test half was not opened.",
    "recordings": "- The test part is a random draw of recordings, not the official half: nearly "
    "all of its patients were heard in training.",
}


def _split_limits(strategy: str, corpora: Sequence[str]) -> list[str]:
    if strategy == "official" and "icbhi" in corpora:
        return [
            "- Patients 156 and 218 are in both halves of ICBHI's official split (120 of 2,756 "
            "test cycles of the whole database)."
        ]
    if strategy == "official":
        return ["- The halves are the corpus's own; the run's log names patients in both of them."]
    return [_SPLIT_LIMITS[strategy]] if strategy in _SPLIT_LIMITS else []


CORPORA = {
    "icbhi": "ICBHI 2017 Respiratory Sound Database (Rocha et al., Physiol. Meas. 40 (2019) "
    "035001)",
    "sprsound": "SPRSound (Zhang et al., IEEE TBioCAS 16 (2022) 867)",
    "manifest": "recordings of a user's own table",
    "spectrograms": "ready-made spectrograms of a user",
}


def corpus_line(names: Sequence[str], synthetic: bool) -> str:
    """Where recordings are from; names: of the corpora, as in `dataset.name`."""
    if synthetic:
        return "synthetic recordings in the layout of ICBHI 2017"
    return " and ".join(CORPORA.get(name, name) for name in dict.fromkeys(names))


def model_card(
    report: Report,
    *,
    corpora: Sequence[str],
    training_counts: Mapping[str, Mapping[str, int]],
    initial_weights: str = "audioset",
) -> str:
    """Model card of a checkpoint (M. Mitchell et al., "Model cards for model reporting",
    FAT* 2019): data, protocol, metrics, baselines, subgroups, limits.

    Args:
        report: of the test part, with its origin and the baselines.
        corpora: their names, as in `dataset.name`.
        training_counts: cycles, recordings, patients and classes of `train` and `val`.
    """
    task, counts, one = report.task, report.counts, report.origin
    parts = {"Training": training_counts["train"], "Validation": training_counts["val"]}
    parts = {name: part for name, part in parts.items() if part["cycles"]} | {"Test": counts}
    lines = [
        f"# Model card: {one.title}",
        "",
        "**For research only. Not a medical device; not to be used for any decision about a "
        "person's health.**",
        "",
        f"- **Model**: {one.title} (`{one.variant}`), {task['n_cls']}-class task with "
        f"outputs {', '.join(task['outputs'])}; initial weights: {initial_weights}; seed "
        f"{one.seed}, epoch {one.epoch + 1}; run `{one.run}`, code revision `{one.revision}`.",
        f"- **Data**: {corpus_line(corpora, report.synthetic)}, split `{one.split_strategy}`. "
        + " ".join(f"{name}: {counts_line(part)}." for name, part in parts.items()),
        f"- **Protocol**: `{report.protocol['selection']}`. {report.protocol['statement']}",
        f"- **Decision**: thresholds {thresholds_line(report.thresholds['chosen'])}.",
        *(f"- **{warning}**" for warning in _warnings(report)),
        "",
        "## Metrics",
        "",
        f"**{_marked('Test part, percent with 95 % intervals over patients', report)}**",
        "",
        *_card_metrics(report),
        "## Subgroups",
        "",
        f"**{_marked('At the chosen thresholds; no rate on fewer than ten cycles', report)}**",
        "",
        *_subgroups(report),
        "## Limits",
        "",
        "- The intervals hold for patients like those of the test part, recorded as they were; "
        f"{counts['patients']} patients cannot show differences of one or two points.",
        "- Device, site, age and body mass index nearly identify a patient in ICBHI 2017, and may "
        "elsewhere; a model that sees them can learn the patient instead of the sound. See the "
        "metadata permutation test and the metadata-only baselines in the evaluation report.",
        *_split_limits(one.split_strategy, corpora),
        "- Annotations come from few experts; their disagreement is not in these intervals.",
        "- The outputs are not calibrated probabilities (the loss and its weighting of positives "
        "shift them); see the calibration in the evaluation report before reading them as such.",
        "- Other devices, sites, ages and diseases than those above were not tested.",
    ]
    return "\n".join(lines) + "\n"


def _card_metrics(report: Report) -> list[str]:
    """The model at both rules of decision, then the baselines."""
    models = {
        f"this model, {rule}: {thresholds_line(report.thresholds[rule])}": metrics
        for rule, metrics in report.metrics.items()
    }
    for name, baseline in (report.baselines or {}).items():
        models[f"baseline: {name}"] = baseline.metrics["chosen"]
    keys = [key for key in HEADLINE if key in {*_PERCENT, "auroc_macro"}]
    keys = [key for key in keys if key in report.metrics["chosen"]]
    rows = [
        [name, *(shown(key, metrics[key], 1) if key in metrics else NOTHING for key in keys)]
        for name, metrics in models.items()
    ]
    return markdown_table(["", *(HEADLINE[key] for key in keys)], rows)
