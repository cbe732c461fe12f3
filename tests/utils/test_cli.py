"""What every command shares: exit statuses, and messages that fit a terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from utils.common.cli import WIDTH, command
from utils.common.errors import Preempted, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, ""),
        (UserError("file f, row 3: mend it"), 2, "error: file f, row 3: mend it\n"),
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


def test_arguments_reach_the_command_and_its_number_is_the_status():
    @command
    def main(words, *, twice=False):
        return len(words) * (2 if twice else 1)

    assert (main(["a"]), main(["a"], twice=True), main([])) == (1, 2, 0)


def test_long_messages_are_wrapped(capsys):
    @command
    def main():
        raise UserError("a message of many words " * 20)

    main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= WIDTH


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


def test_output_that_nobody_reads_to_its_end_is_told_from_the_whole():
    code = (
        "import time; from utils.common.cli import command\n"
        "@command\n"
        "def main():\n"
        "    for _ in range(100): print('line', flush=True); time.sleep(.02)\n"
        "raise SystemExit(main())\n"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read().decode()
    assert run.returncode == 141 and "Traceback" not in errors
