"""Commands in README, docs and notebooks name scripts, modules, files and options that exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("NBs/*"))]
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
#: made by the worked examples, which other tests run
EXAMPLES = ("configs/ast_shift_config.yaml", "configs/methods/patchout.yaml")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def commands(page: Path) -> list[list[str]]:
    """Words after `python`, of every command in code fences and inline code."""
    text = page.read_text(encoding="utf-8").replace("\\\\\\n", " ").replace("\\n", "\n")
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"(?:^[\s\"`]*|`)python ((?:-m )?[\w./]+[^\n`]*)", text, flags=re.MULTILINE)
    return [shlex.split(line.rstrip('",'), comments=True) for line in found]


CASES = sorted({(p.name, " ".join(words)) for p in PAGES for words in commands(p)})


@cache
def help_of(*target: str) -> str:
    """What `python [-m] target --help` prints."""
    out, saved = io.StringIO(), sys.argv
    sys.argv = [target[-1], "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            if target[0] == "-m":
                runpy.run_module(target[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / target[0]), run_name="__main__")
    finally:
        sys.argv = saved
    return out.getvalue()


def test_all_pages_were_read():
    assert len(PAGES) > 10 and len(CASES) > 30


@pytest.mark.parametrize(("page", "command"), CASES)
def test_command_and_its_options_exist(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command.split()
    target = words[:2] if words[0] == "-m" else words[:1]
    if target[0] == "ast_shift_train.py":
        pytest.skip("made by the worked example, which another test runs")
    if target[0] == "-m":
        assert find_spec(target[1]), f"no module {target[1]}"
    else:
        assert (ROOT / target[0]).is_file()
    options = {word.split("=")[0] for word in words[len(target) :] if word.startswith("--")}
    assert not options or options <= set(re.findall(r"--[\w-]+(?:\.\w+)?", help_of(*target)))
    files = [word for word in words if word.startswith(("configs/", "NBs/"))]
    assert all((ROOT / file).exists() or file in EXAMPLES for file in files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"
