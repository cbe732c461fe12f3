"""Slips on the command line, and the sentence that sets them right."""

from __future__ import annotations

import re

import pytest

from utils.common.errors import UserError
from utils.config.schema import load_config
from utils.runs.start import parse_arguments
from utils.training.shared_folder import located


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--epochs 5", "--epochs is no option but a key of the configuration: write "
         "training.epochs=5"),
        ("--training.lr=1e-4", "write training.lr=1e-4"),
        ("--n-cls 2", "write dataset.n_cls=2"),
        ("--depht 2", "--depht is no option; --help lists them"),
        ("training.epochs = 5", "no blanks around =: write training.epochs=5"),
        ("training.epochs= 5", "no blanks around =: write training.epochs=5"),
        ("training.epochs =5", "no blanks around =: write training.epochs=5"),
    ],
)  # fmt: skip
def test_slips_name_the_right_form(words, said):
    with pytest.raises(UserError) as error:
        parse_arguments("", ["--config", "x.yaml", *words.split()])
    assert said in str(error.value)


def test_good_words_stay_good():
    words = ["--config", "x.yaml", "a.b=1", "a.c=", "a.d=x=y", "--seeds", "2"]
    options = parse_arguments("", words)
    assert options.overrides == ["a.b=1", "a.c=", "a.d=x=y"] and options.seeds == [2]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.device=cuda:0", "CUDA_VISIBLE_DEVICES"),
        ("models.ast_film.metadata_fields=[device,weight]", "weight is none; name at least one"),
        ("models.ast_film.metadata_fields=[]", "cannot be: name at least one"),
    ],
)
def test_values_that_cannot_be(word, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(["configs/ast_film_config.yaml"], [word], variant="ast_film")


def test_a_run_folder_names_its_checkpoint(tmp_path):
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert located(tmp_path) == tmp_path  # a shared folder, or what will be refused
    best.parent.mkdir(parents=True)
    best.touch()
    assert located(tmp_path / "run") == best
