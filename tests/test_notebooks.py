"""The notebooks run top to bottom on the synthetic corpus and leave nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "NBs").glob("*.ipynb"))


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
    """What lies in the root and next to the notebooks; tools' caches are hidden ones."""
    entries = (entry for folder in (ROOT, ROOT / "NBs") for entry in folder.iterdir())
    return {entry for entry in entries if not entry.name.startswith(".")}


@pytest.mark.slow
def test_notebooks_run_top_to_bottom(corpus, this_python, tmp_path):
    """All in one kernel, which is emptied in between: it takes longer to start than they to run."""
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    work = tmp_path / "work"
    together, parts = nbformat.v4.new_notebook(), {}
    for path in NOTEBOOKS:
        # in front of the notebook's own cells: the kernel must be this environment's
        probe = (
            "%reset -f\n__spec__ = None  # %reset takes it, and multiprocessing looks at it\n"
            f"import os, sys; os.chdir({str(path.parent)!r}); print(sys.prefix)"
        )
        cells = [nbformat.v4.new_code_cell(probe), *nbformat.read(path, 4).cells]
        parts[path] = [cell for cell in cells if cell.cell_type == "code"]
        together.cells += parts[path]
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
        together,
        timeout=300,
        km=this_python,
        resources={"metadata": {"path": str(ROOT / "NBs")}},  # where Jupyter starts it
    )
    started = weakref.WeakSet()
    client.on_notebook_start = lambda notebook: started.add(client.kc)
    # cleanup_kc: nbclient lets the kernel of a manager that it was given live on, and its client
    # would be found by some later garbage collection and log to a stream that is closed by then
    client.execute(env=environment, cleanup_kc=True)
    gc.collect()
    assert not started, "the kernel's client outlives the notebook"
    for path, cells in parts.items():
        assert cells[0].outputs[0]["text"].strip() == sys.prefix
        assert all(cell.execution_count for cell in cells)
        outputs = [output for cell in cells for output in cell.outputs]
        shown = "".join(output.get("text", "") for output in outputs)
        if "figures" in "".join(cell.source for cell in cells):
            assert any("image/png" in output.get("data", {}) for output in outputs), path.stem
            assert "SYNTHETIC" in shown or "PARTIAL DATA" in shown, path.stem
    assert list(work.glob("runs/*/report.json"))
    assert (work / "checkpoints" / "film_best.pt").is_file()
    left = visible_files() - before
    assert not left, f"left behind: {left}"


def test_all_five_notebooks_are_there():
    assert [path.name[:3] for path in NOTEBOOKS] == ["00-", "01-", "02-", "03-", "04-"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_notebook_leaves_the_corpus_of_make_train_alone(path):
    """`write_corpus` replaces a corpus of other arguments, and so what a run was trained on."""
    source = path.read_text(encoding="utf-8")
    if "demo_data" in source:
        made = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert "--output demo_data --patients 48 --seed 0 --planted-effect\n" in made
        assert r"(data_folder, patients=48, seed=0, planted_effect=\"site\")" in source


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
