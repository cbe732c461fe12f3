"""A command line is answered before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "timm", "transformers", "accelerate", "sklearn", "scipy", "pandas", "matplotlib"}

#: Every command with --help; then a script's --print-config, with a method, and typing errors.
ASKED = """
import contextlib, importlib, io, sys
TRAIN = ("ast_train", "ast_meta_fus_train", "ast_film_train", "ast_tafilm_train", "ast_film_soft")
film = ["ast_film_train", "--config", "configs/ast_film_config.yaml", "dataset.data_folder=x"]
asked = [([name, "--help"], 0) for name in (*TRAIN, "predict", "evaluate", "visualize")]
asked += [([*film, "methods.dat.weight=2", "--print-config"], 0)]
asked += [([*film, "training.epohcs=3"], 2)]
asked += [([name, "--hepl"], 2) for name in ("predict", "evaluate", "visualize")]
for (name, *words), status in asked:
    sys.argv = [f"{name}.py", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = importlib.import_module(name).main()
        except SystemExit as stop:
            found = stop.code
    assert found == status, (name, words, found)
print(*{module.partition(".")[0] for module in sys.modules})
"""


def test_no_heavy_library_before_the_command_line():
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_visualize_offers_the_figures_there_are():
    import visualize
    from utils.figures import commands

    assert [*visualize.FIGURES, "compare", "ablation"] == list(commands.FIGURES)
