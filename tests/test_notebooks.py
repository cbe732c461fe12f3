"""The notebooks run top to bottom on the synthetic corpus; docs/troubleshooting.md quotes messages
that exist."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "NBs").glob("*.ipynb"))
TROUBLES = ROOT / "docs" / "troubleshooting.md"
#: What the writer of a message calls to raise it; `report` and the like pass on such messages.
ERRORS = {"UserError", "BadRecording"}


@pytest.fixture(scope="module")
def corpus(synthetic_corpus, tmp_path_factory) -> Path:
    """A copy of the synthetic corpus, which the first notebook may write into."""
    return Path(shutil.copytree(synthetic_corpus, tmp_path_factory.mktemp("notebooks") / "corpus"))


@pytest.fixture
def this_python(tmp_path, monkeypatch):
    """Kernel manager of this interpreter, whatever other kernel is installed as python3."""
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))  # connection files
    (tmp_path / "runtime").mkdir()
    write_kernel_spec(str(tmp_path / "kernels" / "this-python"))
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="this-python", kernel_spec_manager=specs)


def visible_files() -> set[Path]:
    """What lies in the root and beside the notebooks; tools' caches are hidden ones."""
    entries = (entry for folder in (ROOT, ROOT / "NBs") for entry in folder.iterdir())
    return {entry for entry in entries if not entry.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_notebook_runs_top_to_bottom(path, corpus, this_python, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    work = tmp_path / "work"
    notebook = nbformat.read(path, 4)
    # in front of the notebook's own cells: the kernel must be this environment's
    probe = nbformat.v4.new_code_cell("import sys; print(sys.prefix)")
    notebook.cells.insert(0, probe)
    before = visible_files()
    environment = {
        **os.environ,
        "ICBHI_ROOT": str(corpus),
        "NB_FAST": "1",
        "NB_WORK": str(work),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    client = NotebookClient(
        notebook,
        timeout=300,
        km=this_python,
        resources={"metadata": {"path": str(path.parent)}},  # where Jupyter starts it
    )
    client.execute(env=environment)
    assert notebook.cells[0].outputs[0]["text"].strip() == sys.prefix
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    outputs = [output for cell in ran for output in cell.outputs]
    shown = "".join(output.get("text", "") for output in outputs)
    if "figures" in "".join(cell.source for cell in ran):
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert "SYNTHETIC" in shown or "PARTIAL DATA" in shown
    if "NB_WORK" in "".join(cell.source for cell in ran):
        assert list(work.glob("runs/*/report.json"))
        assert (work / "checkpoints" / "film_best.pt").is_file()
    left = visible_files() - before
    assert not left, f"left behind: {left}"


def test_all_five_notebooks_are_there():
    assert [path.name[:3] for path in NOTEBOOKS] == ["00-", "01-", "02-", "03-", "04-"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_notebook_is_committed_without_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 100_000
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "os.chdir(next(p for p in" in code[0].source  # the first cell goes to the root


# ------------------------------------------------------------------ docs/troubleshooting.md


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
    raising = {name for name, module in messages.items() if module.raises}
    assert {"data/tables.py", "data/audio.py", "utils/validation.py"} <= raising
    silent = [n for n in sorted(raising) if not any(quoted_in(q, messages[n]) for q in quotes())]
    assert not silent, f"docs/troubleshooting.md says nothing of the errors in {silent}"
