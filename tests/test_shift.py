"""The study of conditioning under a prior that shifts, with made-up runs in place of training."""

from __future__ import annotations

import re

import numpy as np
import pytest

from experiments import planted_effect, shift, shift_synthetic
from models.registry import VARIANTS
from tests.utils.evaluation_tables import finish_run
from utils.evaluation.report import read_report
from utils.metrics.score import sp_se_score
from utils.runs.cells import Cell
from utils.training.runfolder import RunFolder

SMALL = """
scripts: {ast_train.py: configs/ast_config.yaml, ast_film_train.py: configs/ast_film_config.yaml}
configs:
  - null
  - configs/methods/prior_product.yaml
  - {training.balance: [device]}
  - {"models.*.metadata_dropout_joint": 0.5}
overrides: {dataset.split_strategy: training_half, dataset.test_fraction: 0.3}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, configurations of the runs in turn, run again -> those that it ran); runs are
    finished at once, by chance."""
    folder, ran = tmp_path_factory.mktemp("shift"), []

    def finish(grid, workers):
        for cell in grid.cells:
            if not cell.folder.finished:
                finish_run(cell.config, seed=len(ran))
                ran.append(cell.config)
        return []

    def again():
        before = len(ran)
        where = ["--work", str(folder / "work"), "--output", str(folder / "shift.md")]
        words = [f"training.output_dir={folder / 'runs'}", "--seeds", "1", "--screen-seeds", "1"]
        shift.main(["--data-folder", "nowhere", *where, *words])
        return ran[before:]

    (folder / "screening.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shift, "RESAMPLES", 40)
        patch.setattr(shift, "SCREENING", folder / "screening.yaml")
        patch.setattr(shift, "VARIANTS", {v: VARIANTS[v] for v in ("ast", "ast_film")})
        patch.setattr(shift, "DEVICES", ("Meditron",))
        patch.setattr(shift, "run_tracked", finish)
        yield folder, again(), again


def test_the_stages_and_their_page(study):
    folder, ran, again = study
    page = (folder / "shift.md").read_text()
    of = {s: [c for c in ran if c.dataset.split_strategy == s]
          for s in ("training_half", "official", "leave_device_out")}  # fmt: skip
    screened = {(c.variant, shift.way_of(c)) for c in of["training_half"]}
    assert len(screened) == len(of["training_half"]) == 7  # dropout is nothing to the plain AST
    ways = {way for variant, way in screened if variant == "ast_film"}
    assert ways == {"plain", "prior product", "balance by device", "metadata dropout"}
    order = re.findall(r"^\d+\. (.*): ([\d.]+)$", page, re.M)
    values = [float(value) for _, value in order]
    assert {name for name, _ in order} == ways - {"plain"} and values == sorted(values)[::-1]
    best = [name for name, _ in order[:2]]
    assert {shift.way_of(c) for c in of["official"]} == {"plain", *best}
    assert {c.variant for c in of["official"]} == {"ast", "ast_film"}
    assert {c.dataset.test_device for c in of["leave_device_out"]} == {"Meditron"}
    assert [shift.way_of(c) for c in of["leave_device_out"]] == ["plain", "plain", best[0]]
    folders = [f.name for f in (folder / "runs").iterdir() if (f / "report.json").is_file()]
    assert len(folders) == len(ran) and all(f"`{name}`" in page for name in folders)
    assert (folder / "shift.png").is_file()
    assert again() == []


def test_the_tables_are_those_of_the_reports(study):
    folder, ran, _ = study
    page = (folder / "shift.md").read_text()
    table = page.partition("## Screening")[2].partition("## Official")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    found = {(row[0], row[1]): row for row in rows[1:]}
    config = next(c for c in ran if c.variant == "ast_film" and shift.way_of(c) == "prior product")
    own = RunFolder.of(config)
    score = read_report(own.report).test.metrics["chosen"]["score"].value
    row = found["FiLM-AST", "prior product"]
    assert row[6].startswith(f"{score:.1f} [")
    base = float(found["AST", "plain"][6].split()[0])
    assert float(row[8].split()[0]) == pytest.approx(score - base, abs=0.11)
    one = shift.Done.of(Cell("", config))
    true, pred = one.classes
    device = one.frame["device"].to_numpy()
    scores = [sp_se_score(true[device == d], pred[device == d]).score for d in set(device)]
    assert one.within_devices() == pytest.approx(np.nanmean(scores))
    assert row[3].startswith(f"{one.within_devices():.1f} ±")


def test_synthetic_page_from_records():
    """Differences and the share of the gain that is kept, from tables made by hand."""

    def record(corpus, variant, way, hits):
        table = [[[10, 0, 0, 0], [10 - hits, hits, 0, 0], [0] * 4, [0] * 4]] * 6
        own = {"corpus": corpus, "variant": variant, "way": way, "seed": 0, "cpu_seconds": 1.0}
        counts = {k: {"cycles": 120, "patients": 6} for k in ("train", "test")}
        return own | {"counts": counts, "test": {"real": [table]}}

    records = [
        record("site", "ast", "plain", 2),
        record("site", "ast_film", "plain", 10),
        record("site", "ast_film", "prior product", 9),
    ]
    page = shift_synthetic.to_markdown(records, "# Head")
    row = next(line for line in page.splitlines() if "FiLM-AST, prior product" in line)
    assert "+35.0 [+35.0, +35.0]" in row and "-5.0 [-5.0, -5.0]" in row and "| 88 |" in row
    planned = shift_synthetic.jobs(2)
    assert len(planned) == len(set(planned))
    assert {j.variant for j in planned if j.corpus == "reversed" and j.way == "plain"} == set(
        planted_effect.VARIANTS
    )


def test_a_way_is_part_of_a_synthetic_run(tmp_path):
    study = shift_synthetic.Study(tmp_path, 20)
    job = shift_synthetic.Job("reversed", "ast_film", 0, "balance by device")
    assert study.configure(job).training.balance == ["device"]
    assert study.path(job) != study.path(job._replace(way="plain"))
    for way in shift_synthetic.WAYS:
        assert (shift.way_of(study.configure(job._replace(way=way))) == "plain") == (way == "plain")
