"""What every command shares: exit statuses, messages, lost output."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.common.cli import command, quiet
from utils.common.errors import Preempted, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, ""),
        (UserError("file f, row 3: correct it"), 2, "error: file f, row 3: correct it\n"),
        (Preempted(), 75, "warning: stopped by SIGTERM; the state is saved"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_every_end_has_its_status(end, status, said, capsys):
    @command
    def main():
        if end is not None:
            raise end

    assert main() == status
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    "fill",
    [
        lambda: bytearray(1 << 62),
        lambda: np.zeros((1 << 30, 1 << 20)),
        lambda: torch.empty(1 << 50, dtype=torch.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to ...")),
    ],
)
def test_memory_that_is_not_there_is_one_sentence(fill, capsys):
    @command
    def main():
        fill()

    assert main() == 2
    assert re.match(r"error: out of memory \(.+\); lower dataset.batch_size", said(capsys))


def test_another_runtime_error_is_not_hidden():
    @command
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


def said(capsys) -> str:
    return capsys.readouterr().err


def test_arguments_reach_the_command_and_its_number_is_the_status():
    @command
    def main(words, *, twice=False):
        return len(words) * (2 if twice else 1)

    assert (main(["a"]), main(["a"], twice=True), main([])) == (1, 2, 0)


def test_a_banner_has_no_dangling_prefix(capsys):
    @command
    def main():
        logging.getLogger("utils.x").warning("%s", "\n========\nPARTIAL DATA\n========")
        logging.getLogger("utils.x").warning("two\nlines")

    main()
    err = capsys.readouterr().err
    assert err == "\n========\nPARTIAL DATA\n========\nwarning: two\nlines\n"


def test_a_broken_pipe_that_is_not_the_output_is_an_error():
    @command
    def main() -> None:
        raise BrokenPipeError("a server that has gone")

    with pytest.raises(BrokenPipeError):
        main()


def test_quiet_puts_the_level_back(caplog):
    log = logging.getLogger("utils.test")

    @quiet()
    def main() -> None:
        log.info("within")
        raise UserError("x")

    with caplog.at_level(logging.INFO):
        with pytest.raises(UserError):
            main()
        log.info("after")
    assert caplog.messages == ["after"]


LOUD = """
from pathlib import Path
from utils.common.cli import command
@command
def main():
    for _ in range(20000): print("line")
    Path("done").touch()
raise SystemExit(main())
"""


@pytest.mark.parametrize(
    ("redirection", "message"),
    [("| head -1", ""), (">&-", ""), (">/dev/full", "<stdout> cannot be written"), ("2>&-", "")],
)
def test_lost_output_ends_no_run(redirection, message, tmp_path):
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(LOUD)} {redirection}"
    shell = ["bash", "-c", f"set -o pipefail; {line}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert message in done.stderr and "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(message)


def test_a_user_without_a_name_is_given_one():
    code = (
        "import pwd\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "import utils.common, getpass; print(getpass.getuser())"
    )
    names = {"LOGNAME", "USER", "LNAME", "USERNAME"}
    environment = {k: v for k, v in os.environ.items() if k not in names}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"uid-{os.getuid()}\n", done.stderr
