"""A grid file and its cells: lists of override sets over configurations, each cell one command."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from utils.common.errors import UserError
from utils.common.settings import check_section
from utils.config.merge import merge, read_yaml
from utils.config.schema import RunConfig, flatten, load_config
from utils.evaluation.render import number
from utils.evaluation.result_tables import TABLES
from utils.metrics.protocol import caption, is_leaky
from utils.training.runfolder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class GridFile:
    """What a grid file holds: every combination of a script, a further configuration (null: none;
    a file, keys and values, or a list of these) and of the keys' values is a cell."""

    scripts: dict[str, str] = field(default_factory=dict)  # script: its configuration
    configs: list[Any] = field(default_factory=lambda: [None])  # merged after it, one per cell
    # one script with one further configuration, in addition to the combinations: [script, its
    # configuration, further ...]
    systems: list[list[Any]] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)  # key: values
    overrides: dict[str, Any] = field(default_factory=dict)  # key: value, in every cell
    seeds: list[int] = field(default_factory=lambda: [0])
    table: str | None = None  # of result_tables; null: whichever the runs can fill

    @classmethod
    def read(cls, file: str | Path) -> GridFile:
        """Raises UserError: the file, a key or the kind of a value is wrong."""
        merged = merge(OmegaConf.structured(cls), read_yaml(file), f"in {file}")
        content = cls(**OmegaConf.to_container(merged))
        if not content.scripts and not content.systems:
            raise UserError(f"{file}: scripts is missing; name script: configuration")
        for key, values in content.grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{file}: grid.{key} must be a list of values")
        if any(len(system) < 2 for system in content.systems):
            raise UserError(f"{file}: each of systems must be [script, configuration, ...]")
        if content.table not in (None, *TABLES):
            names = ", ".join(TABLES)
            raise UserError(f"{file}: no table {content.table!r}; there are {names}")
        return content

    def rows(self) -> list[list[Any]]:
        """[script, configurations ...] of each combination, then `systems`."""
        further = [part if isinstance(part, list) else [part] for part in self.configs]
        pairs = itertools.product(self.scripts.items(), further)
        return [[*script, *parts] for script, parts in pairs] + self.systems


@dataclass(frozen=True)
class Cell:
    """One run of a grid: what it is called, its configuration, its command after `python`."""

    label: str
    config: RunConfig
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)

    def score(self) -> str:
        """Test Score of the finished run, in percent, with the marks that belong to it."""
        report = self.folder.read_report()
        value = number(report["test"]["metrics"]["chosen"]["score"]["value"])
        marks = report["selection"], report["partial"], report["synthetic"]
        marks += (is_leaky(report["split_strategy"]),)
        return caption(f"Score {value}", *marks)


@dataclass(frozen=True)
class Grid:
    """Cells in the order they run, and the folder of what they say together."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    table: str | None = None

    def commands(self) -> list[str]:
        """Shell commands, one per cell."""
        return [shlex.join(["python", *cell.arguments]) for cell in self.cells]

    def log(self, cell: Cell) -> Path:
        """What a cell printed; how it ended lies next to it (`utils.runs.processes`)."""
        return self.folder / "logs" / f"{cell.folder.path.name}.log"


def override_sets(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the keys' values, the last key fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]


def seeds_from(words: Sequence[int]) -> list[int]:
    """--seeds: one number n means 0..n-1, several mean just these.

    Raises:
        UserError: none, or a negative one.
    """
    seeds = list(range(words[0])) if len(words) == 1 else list(dict.fromkeys(words))
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, words))}: give a count or seeds from 0")
    return seeds


def read_grid(
    file: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    config_files: Sequence[str] = (),
    mlflow_file: str | None = None,
    overrides: Sequence[str] = (),
) -> Grid:
    """The cells of a grid file, every configuration checked.

    Args:
        file: YAML with the keys of `GridFile`.
        seeds: as the scripts' --seeds; None: those of the file.
        config_files: merged after each script's configuration.
        overrides: key=value words, in every cell.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    content = GridFile.read(file)
    fixed = [word(key, value) for key, value in content.overrides.items()]
    for text in [*fixed, *overrides]:
        key = text.partition("=")[0]
        if key in content.grid or key == "training.seed":
            by = "--seeds" if key == "training.seed" else "the grid"
            raise UserError(f"{key} is set by {by}; leave {text} out")
    seeds = content.seeds if seeds is None else seeds_from(seeds)
    cells = []
    for (script, *parts), values in itertools.product(content.rows(), override_sets(content.grid)):
        own = [part for part in parts if isinstance(part, dict)]
        given = [word(k, v) for part in own for k, v in flatten(part).items()]
        files = [found(part) for part in parts if isinstance(part, str)] + list(config_files)
        varied = [word(key, value) for key, value in values.items()]
        words = [*fixed, *given, *varied, *overrides]
        cells += make_cells(script, files, words, seeds, mlflow_file, shown=[*given, *varied])
    name = Path(file).stem
    folder = f"ablation-{name}-{digest([cell.folder.path.name for cell in cells])}"
    folder = Path(cells[0].config.training.output_dir) / folder
    member = ("--member-of", str(folder))
    cells = [Cell(c.label, c.config, (*c.arguments, *member)) for c in cells]
    title = f"ablation {name}: {len(cells)} runs"
    return Grid(title, folder, tuple(cells), content.table)


def make_cells(
    script: str,
    files: Sequence[str],
    words: Sequence[str],
    seeds: Sequence[int],
    mlflow_file: str | None = None,
    *,
    shown: Sequence[str] = (),
) -> list[Cell]:
    """One cell per seed: a script with configuration files and key=value words.

    Args:
        shown: the words that tell the cell from others, for its label.

    Raises:
        UserError: names the cell and what is wrong in it.
    """
    cells: list[Cell] = []
    for seed in seeds:
        last = f"training.seed={seed}"
        names = [re.sub(r"^[^=]*\.", "", text) for text in (*shown, last)]
        try:
            if cells:  # reading takes a tenth of a second; the seed is all that differs
                config = copy.deepcopy(cells[0].config)
                config.training.seed = seed
                check_section(config.training, "training")
            else:
                config = load_config(files, [*words, last], mlflow_file=mlflow_file)
        except UserError as error:
            raise UserError(f"{script} {' '.join(names)}: {error}") from None
        arguments = [found(script), "--config", *files, *words, last]
        arguments += ["--mlflow-config", mlflow_file] if mlflow_file else []
        cells.append(Cell(" ".join([config.title, *names]), config, tuple(arguments)))
    return cells


def found(name: str) -> str:
    """A file of the repository as it is written from the current folder."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return str(path)
    raise UserError(f"no file {name}, named in the grid")


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0].strip()


def word(key: str, value: Any) -> str:
    """key=value as the command line takes it."""
    return f"{key}={_text(value)}".replace(", ", ",")
