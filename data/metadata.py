"""Write `icbhi_metadata.csv`, one row per breathing cycle, from annotations and tables.

    python -m data.metadata --data-folder DIR --output FILE

No audio is needed. A training run writes the file itself where it is absent.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from data.corpora.icbhi import read_cycles
from data.cycle_table import COLUMNS, write_metadata
from utils.common.cli import command

log = logging.getLogger(__name__)


def build_metadata(data_folder: str | Path) -> pd.DataFrame:
    """The rows of the file; see `data.corpora.icbhi.read_cycles` for the errors."""
    return read_cycles(data_folder, require_audio=False)[list(COLUMNS)]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.metadata", description=__doc__)
    parser.add_argument("--data-folder", required=True, help="annotations and tables (no audio)")
    parser.add_argument("--output", required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    table = build_metadata(options.data_folder)
    write_metadata(table, options.output)
    log.info(
        "%s: %d cycles of %d recordings and %d patients",
        *(options.output, len(table), table["Filename"].nunique(), table["PID"].nunique()),
    )


if __name__ == "__main__":
    sys.exit(main())
