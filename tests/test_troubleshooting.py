"""docs/troubleshooting.md quotes messages that exist, and covers every module that raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TROUBLES = ROOT / "docs" / "troubleshooting.md"
#: What the writer of a message calls to raise it; `report` and the like pass on such messages.
ERRORS = {"UserError", "BadRecording"}


def quotes() -> list[str]:
    """The quoted message beginnings: all code in the first column of the page's tables."""
    rows = re.findall(r"^\| (`.*?) \| ", TROUBLES.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def pattern(text: str) -> str:
    """A message with NUL for each part that varies: <...> in the page, %s in logged ones."""
    text = re.sub(r"<[^<>]*>|%\.?\d*[sdf]", "\0", text)
    return re.sub(r"\0+", "\0", text)


class Messages(ast.NodeVisitor):
    """Every string of a module, as a pattern; docstrings and parts of f-strings are no strings."""

    def __init__(self):
        self.patterns: list[str] = []
        self.raises = False

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.patterns.append(re.sub("\0+", "\0", re.sub(r"%\.?\d*[sdf]", "\0", node.value)))

    def visit_JoinedStr(self, node):
        parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
        self.patterns.append(re.sub("\0+", "\0", "".join(parts)))
        for part in node.values:  # "{'PARTIAL DATA' if fewer else ...}" begins a message, too
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)

    def visit_Call(self, node):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        self.raises |= name in ERRORS
        self.generic_visit(node)


@pytest.fixture(scope="module")
def messages() -> dict[str, Messages]:
    """Messages of each module of the repository."""
    found = {}
    for folder in ("data", "models", "utils"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[path.relative_to(ROOT).as_posix()] = visitor = Messages()
            visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def quoted_in(quote: str, module: Messages) -> bool:
    return any(message.startswith(pattern(quote)) for message in module.patterns)


def test_quoted_messages_exist(messages):
    assert len(quotes()) > 100
    empty = [q for q in quotes() if len(pattern(q).replace("\0", "").strip()) < 6]
    assert not empty, f"so short that any message would do: {empty}"
    gone = [q for q in quotes() if not any(quoted_in(q, m) for m in messages.values())]
    assert not gone, f"docs/troubleshooting.md quotes what no code says: {gone}"


def test_no_message_is_quoted_twice():
    seen = [pattern(quote) for quote in quotes()]
    assert sorted(set(seen)) == sorted(seen)


def test_every_module_that_raises_is_covered(messages):
    raising = {n for n, module in messages.items() if module.raises}
    assert {
        "data/corpora/icbhi_tables.py",
        "data/audio.py",
        "utils/config/validation.py",
    } <= raising
    silent = [n for n in sorted(raising) if not any(quoted_in(q, messages[n]) for q in quotes())]
    assert not silent, f"docs/troubleshooting.md says nothing of the errors in {silent}"
