"""The figures of benchmarks.gpu as a page, and which targets they meet."""

from __future__ import annotations

from typing import Any

#: share of the bf16 matrix rate in training at batch 64; time of a conditioned variant over the
#: plain AST's; clips/s of the front end; ms per batch of the loop
SHARE, CONDITIONED, CLIPS, LOOP_MS = 0.5, 1.03, 20_000, 1.0
#: names of parts and contestants that the targets are about
STEP_PEERS, STEP_VARIANTS, STUB = "peers, step, batch 64", "variants, step, batch 64", "stub"


def rounded(value: Any) -> Any:
    """The same with 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def targets(content: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, wanted, measured, met) of every target whose figures are there."""

    def results(section: str) -> dict[str, Any]:
        return content["sections"].get(section, {}).get("results", {})

    rows = []
    for name, checked in results("correctness").items():
        for kind, figures in checked.items():
            worst = max(figures[k] for k in ("logits", "gradients", "log_mel") if k in figures)
            wanted, met = figures["limit"], worst <= figures["limit"]
            rows.append((f"error of {name}, {kind}", f"<= {wanted:g}", f"{worst:.2g}", met))
    shares = {
        label: row["of_matmul"]
        for label, row in results("model_step").get(STEP_PEERS, {}).items()
        if label.startswith("ours") and "of_matmul" in row
    }
    if shares:
        best = max(shares, key=shares.get)
        what = f"{STEP_PEERS}: share of the bf16 matrix rate ({best})"
        rows.append((what, f">= {SHARE:.0%}", f"{shares[best]:.1%}", shares[best] >= SHARE))
    for part, contestants in results("model_step").items():
        if not part.startswith(STEP_VARIANTS):
            continue
        for label, row in contestants.items():
            if label in ("ast", "matmul") or "time_over_base" not in row:
                continue
            ratio = row["time_over_base"]
            what = f"{part}: {label} over ast"
            rows.append((what, f"<= {CONDITIONED}", f"{ratio:.3f}", ratio <= CONDITIONED))
    rates = [row["front_end_clips_per_s"] for row in results("frontend").values()]
    if rates:
        rows.append(("front end, clips/s", f">= {CLIPS}", f"{max(rates):.0f}", max(rates) >= CLIPS))
    if STUB in results("loop"):
        added = results("loop")[STUB]["added_ms_per_batch"]
        rows.append(("loop, ms per batch of 16", f"<= {LOOP_MS}", f"{added:.3g}", added <= LOOP_MS))
    for name, row in results("loop").items():
        if "synchronisations" in row:
            found = row["synchronisations"]
            rows.append((f"waits for the device in a step, {name}", "none", found, found == "none"))
    for name, row in results("training").items():
        measured = f"{row['first_loss']:.4g} -> {row['last_loss']:.4g}"
        rows.append((f"training {name}: loss", "falls", measured, row["loss_falls"]))
    return rows


def to_markdown(content: dict[str, Any]) -> str:
    """The whole page."""
    facts = [f"{content['device']}, {content['date']}, torch {content['torch']}"]
    facts += [f"CUDA {content['cuda']}"] if content["cuda"] else []
    lines = [f"# {facts[0]}", "", ", ".join(facts) + f", Python {content['python']}."]
    if content["quick"]:
        lines += ["", "**Tiny sizes (--quick): this shows that the program runs, and no speed.**"]
    words = sorted({section["command"] for section in content["sections"].values()})
    lines += ["", *(f"`{word}`" for word in words), ""]
    lines += [
        "Times are medians; `spread` is an interquartile range over the median, of ratios where it "
        "stands beside a ratio.",
    ]
    rows = {
        what: {"wanted": wanted, "measured": measured, "met": "yes" if met else "**no**"}
        for what, wanted, measured, met in targets(content)
    }
    if rows and not content["quick"]:
        lines += ["", "## Targets", "", *table(rows)]
    for name, section in content["sections"].items():
        lines += ["", f"## {name}: {section['status']} ({section['seconds']:.0f} s)", ""]
        lines += [section["message"], ""] if section["message"] else []
        lines += _tables(section["results"])
    return "\n".join(lines).rstrip() + "\n"


def _tables(results: dict[str, Any]) -> list[str]:
    """One table for flat parts; one each, under its name, for parts of several rows."""
    flat = {k: v for k, v in results.items() if not any(isinstance(x, dict) for x in v.values())}
    lines = table(flat) if flat else []
    for part, rows in results.items():
        if part not in flat:
            lines += [*([""] if lines else []), f"{part}:", "", *table(rows)]
    return lines


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Rows by name; the columns are all figures that any row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        cells = [_cell(row.get(column, "")) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
