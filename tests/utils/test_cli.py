"""What every command shares: exit statuses, and messages that fit a terminal."""

from __future__ import annotations

import logging

import pytest

from utils.cli import WIDTH, command
from utils.errors import Preempted, UserError


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
