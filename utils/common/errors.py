"""Exceptions that end a command in words: what the user can fix, and being preempted."""


class UserError(Exception):
    """A problem with a file, row, key or machine; the message names it and the remedy.

    Commands print the message without a traceback and exit with status 2.
    """


class Busy(UserError):
    """Somebody else is at work on a run folder, a store or a grid's cell. Exit status 73."""


class Preempted(Exception):
    """SIGTERM arrived; the state is saved and the run can be resumed. Exit status 75."""
