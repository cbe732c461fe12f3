"""Errors, files, locks and the command line: what everything else may use."""

import getpass
import os
import tempfile

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user without a name: torch._dynamo cannot be imported
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")  # noqa: PTH118
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
