"""Every configuration key in one table, read from the dataclasses and their comments.

python -m utils.config.table                   print the table as Markdown
python -m utils.config.table --write [FILE]    put it between the marks in docs/configuration.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

from omegaconf import MISSING

from models.config import ModelConfig
from models.registry import METHODS, VARIANTS
from utils.common.errors import UserError
from utils.common.files import write_text
from utils.config import schema

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
BEGIN, END = "<!-- keys: begin (python -m utils.config.table --write) -->", "<!-- keys: end -->"
FIELD = re.compile(r"^ {4}(\w+): [^#]*?(?:#\s*(.*))?$")
COMMENT = re.compile(r"^ {4}#\s*(.*)$")


def meanings(section: type) -> dict[str, str]:
    """Field -> the comment next to it, or the comment lines directly above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(section).splitlines():
        if match := COMMENT.match(line):
            above.append(match[1])
        elif match := FIELD.match(line):
            found[match[1]] = match[2] or " ".join(above)
            above = []
        else:
            above = []
    return found


def rows(section: type, prefix: str, skip: frozenset[str] = frozenset()) -> list[str]:
    """Markdown rows `| key | default | meaning |` of one dataclass, inherited fields first."""
    comments: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        if dataclasses.is_dataclass(base):
            comments |= meanings(base)
    lines = []
    for field in dataclasses.fields(section):
        if field.name in skip:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        words = {None: "null", True: "true", False: "false", MISSING: "(must be set)"}
        shown = words.get(default, default) if isinstance(default, str | bool | None) else default
        meaning = comments.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{prefix}.{field.name}` | `{shown}` | {meaning} |")
    return lines


def table() -> str:
    """The whole table as Markdown."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(schema.RunConfig):
        if field.name == "methods":
            for name, method in METHODS.items():
                lines += rows(method.config_class, f"methods.{name}")
            continue
        if field.name != "models":
            lines += rows(getattr(schema, _class_name(field)), field.name)
            continue
        common = frozenset(f.name for f in dataclasses.fields(ModelConfig))
        lines += rows(ModelConfig, "models.<variant>")
        shown = set()
        for variant in VARIANTS.values():
            for row in rows(variant.config_class, "models.<variant>", common):
                key = row.split("`")[1].rpartition(".")[2]
                having = [
                    v.short for v in VARIANTS.values() if key in v.config_class.__dataclass_fields__
                ]
                if key not in shown:
                    lines.append(f"{row[:-2]} ({', '.join(having)}) |")
                shown.add(key)
    return "\n".join(lines)


def _class_name(field: dataclasses.Field) -> str:
    return field.type if isinstance(field.type, str) else field.type.__name__


def insert(text: str, content: str, file: str | Path = PAGE) -> str:
    """`text` of a file with `content` between the marks.

    Raises:
        UserError: the marks are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file} has no lines {BEGIN} and {END} for the table to stand between")
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=PAGE,
        metavar="FILE",
        help="update the table in FILE; without a name docs/configuration.md",
    )
    file = parser.parse_args().write
    if file is None:
        print(table())
    else:
        write_text(file, insert(file.read_text(encoding="utf-8"), table(), file))


if __name__ == "__main__":
    main()
