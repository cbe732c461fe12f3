"""Errors, files, locks and the command line: what everything else may use."""

import getpass
import os

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user without a name, whom torch would not let import it
    os.environ["USER"] = f"uid-{os.getuid()}"
