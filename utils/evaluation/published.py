"""Published systems on ICBHI 2017: `utils/figures/published.csv`, checked; the papers' values.

One row per system and task, with its source. `selection` says how the epoch and the thresholds were
chosen as far as the paper or its public code shows it, `evidence` where that was seen. `split` is
`official` where a paper states it and no public code says otherwise. `caveat` names what else keeps
a value from being compared, `note` explains both and begins with "collapsed" where the two classes
are a four-class model's. `blocks` and `layers` are set in the rows of the ablations of the paper
behind SoftFiLM: trainable blocks, number of conditioned layers (the last ones); empty in a row
means all 12.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from utils.common.errors import UserError
from utils.metrics.protocol import Selection

TABLE = Path(__file__).parents[1] / "figures" / "published.csv"
COLUMNS = (
    "task", "method", "authors", "year", "venue", "backbone", "metadata", "sp", "se", "score",
    "score_sd", "split", "selection", "caveat", "evidence", "source", "values_from", "note",
    "sp_sd", "se_sd", "blocks", "layers",
)  # fmt: skip
TASKS = ("4-class", "2-class")
NOT_STATED = "not stated"
OFFICIAL, SHUFFLED, UNCLEAR = "official", "recordings shuffled", "unclear"
SPLITS = (OFFICIAL, SHUFFLED, UNCLEAR, "quarter of the official test part")
OTHER_SE, LABEL_SEEN, ENSEMBLE = "another Se", "label in the input", "ensemble"
CAVEATS = (OTHER_SE, LABEL_SEEN, ENSEMBLE)
PEOPLE = "people"  # backbone of the physicians
#: Published system -> title of the same system here; the backbone must be the AST.
OURS = {
    "AST fine-tuning": "AST",
    "Patch-Mix CL": "AST + Patch-Mix CL",
    "SG-SCL": "AST + SG-SCL",
    "DAT": "AST + DAT",
    "LoRA-RSC": "AST + LoRA",
}
AUTHORS = "Kontogiannis et al."  # of the paper that this repository implements
BLOCKS = 12  # of the AST


@cache
def read_published(path: Path = TABLE) -> pd.DataFrame:
    """The table; every row has a source and a Score.

    Raises:
        UserError: names the file, the row and what is wrong with it.
    """
    table = pd.read_csv(path, dtype={"year": "Int64", "blocks": "Int64", "layers": "Int64"})
    if tuple(table.columns) != COLUMNS:
        raise UserError(f"{path}: the columns must be {', '.join(COLUMNS)}")
    for number, row in enumerate(table.itertuples(index=False), start=2):
        where = f"{path}, line {number} ({row.method})"
        if row.task not in TASKS:
            raise UserError(f"{where}: task must be one of {', '.join(TASKS)}, not {row.task!r}")
        if row.selection not in (*Selection, NOT_STATED):
            raise UserError(f"{where}: selection must be validation, fixed, test or {NOT_STATED}")
        if row.split not in SPLITS:
            raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}")
        if not (pd.isna(row.caveat) or row.caveat in CAVEATS):
            raise UserError(f"{where}: caveat must be empty or one of {', '.join(CAVEATS)}")
        if (row.split != OFFICIAL or not pd.isna(row.caveat)) and pd.isna(row.note):
            raise UserError(f"{where}: split and caveat need a note that explains them")
        if row.selection != NOT_STATED and pd.isna(row.evidence):
            raise UserError(f"{where}: selection {row.selection!r} needs its evidence")
        if pd.isna(row.source) or pd.isna(row.values_from) or not 0 < row.score < 100:
            raise UserError(f"{where}: give score (percent), source and values_from")
    return table


def systems() -> pd.DataFrame:
    """The rows of whole systems: no ablations, and one row per system."""
    table = read_published()
    return table[table.blocks.isna() & table.layers.isna()]


def of_four_classes(table: pd.DataFrame) -> pd.Series:
    """Of each row, whether its two classes are those of a four-class model, collapsed."""
    return table.note.fillna("").str.startswith("collapsed")
