"""The command line of the five scripts: read and refused before anything heavy is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.common.errors import UserError
from utils.config.schema import RunConfig, config_to_dict, config_to_yaml, flatten, load_config

if TYPE_CHECKING:
    from utils.runs.run import Run


def start(variant: str, description: str, arguments: Sequence[str] | None = None) -> Iterator[Run]:
    """Read the command line and yield the runs it asks for, each ready to be trained."""
    options = parse_arguments(description, arguments)
    config = load_config(
        options.config, options.overrides, mlflow_file=options.mlflow_config, variant=variant
    )
    if config.fusion.members:
        raise UserError("fusion.members cannot be trained here; use python -m utils.runs.fuse")
    if options.print_config:
        print(config_to_yaml(config), end="")
        return
    from utils.runs.run import runs_of  # torch and all the rest

    yield from runs_of(
        config,
        seeds=options.seeds,
        folds=options.folds,
        member_of=options.member_of,
        validate_only=options.validate_only,
    )


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line that the five scripts share; `overrides` are the key=value words."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s --config FILE [FILE ...] [options] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="YAML, merged")
    parser.add_argument(
        "--mlflow-config", metavar="FILE", help="tracking; default: as configs/mlflow.yaml"
    )
    parser.add_argument("--print-config", action="store_true", help="show what would run and stop")
    parser.add_argument(
        "--member-of",
        type=Path,
        metavar="DIR",
        help="folder of the grid this run belongs to: nested below its MLflow run, and "
        "checkpoints/ stays as it is",
    )
    parser.add_argument(
        "--validate-only",
        action="store_true",
        help="stop after training, with the validation Score in record.json and the test half "
        "closed; the same command without this option opens it",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="one number n: 0..n-1; several: just these",
    )
    parser.add_argument(
        "--folds",
        nargs="+",
        metavar="K",
        help="all, or folds 0..4; needs dataset.split_strategy=foldwise",
    )
    # key=value words may stand anywhere, so that argparse never takes one for an option's value
    given = list(sys.argv[1:] if arguments is None else arguments)
    _no_blanks(given)
    overrides = [w for w in given if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options, unknown = parser.parse_known_args([word for word in given if word not in overrides])
    if unknown:
        raise UserError(_as_override(unknown))
    options.overrides = overrides
    return options


def _no_blanks(words: Sequence[str]) -> None:
    """Refuse `key = value`, `key= value` and `key =value`."""
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word.startswith("=") or (word.endswith("=") and after and "=" not in after):
            key, value = (before, after) if word == "=" else (before, word[1:])
            key, value = (word[:-1], after) if word[0] != "=" else (key, value)
            raise UserError(f"no blanks around =: write {key}={value}")


def _as_override(words: Sequence[str]) -> str:
    """What to write in place of options that do not exist, such as --epochs 5."""
    option, _, value = words[0].partition("=")
    name = option.lstrip("-").replace("-", "_")
    if not option.startswith("-"):
        return f"{words[0]} is no key=value word, such as training.epochs=20"
    keys = flatten(config_to_dict(RunConfig()))
    found = [key for key in keys if key == name or key.endswith(f".{name}")]
    value = value or next(iter(words[1:]), "VALUE")
    if not found:
        return f"{option} is no option; --help lists them, and any key is set as key=value"
    written = " or ".join(f"{key}={value}" for key in found)
    return f"{option} is no option but a key of the configuration: write {written}"
