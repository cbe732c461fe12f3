"""One owner at a time of a folder or file, among processes and machines that share a file system.

The lock of `runs/x` is the file `runs/.x.lock`: created exclusively (no `flock`, which network file
systems may lack), holding who owns it, touched every few seconds. It is taken over when its owner
is dead (same machine) or has not touched it for STALE seconds by the file system's own clock.
filelock's SoftFileLock and SoftFileLease cannot take over where names cannot be exchanged (NFS,
SMB), so filelock only guards the moment of taking over.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from utils.common.errors import Busy, UserError
from utils.common.files import write_error

logger = logging.getLogger(__name__)

BEAT, STALE, POLL = 5.0, 60.0, 0.5  # s between touches; without a touch; between attempts
GUARD = 10.0  # s, of which taking over needs some milliseconds


@contextmanager
def held(
    path: str | Path, what: str | None = None, wait: bool | float = False
) -> Iterator[threading.Event]:
    """Own `path` (which need not exist) inside the block.

    Args:
        what: how the message calls it; by default its path.
        wait: seconds to wait for another owner; True waits without limit.

    Yields:
        An event that is set if the lock is lost, because this process was suspended for so long
        that another took over.

    Raises:
        Busy: somebody else owns it; the message says who and since when.
        UserError: the lock cannot be written.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    record = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
    record |= {"started": _started(os.getpid()), "token": uuid.uuid4().hex}
    record["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    deadline = time.monotonic() + (math.inf if wait is True else wait)
    announced = False
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if _create(file, record):
                break
            owner = _read(file)
            if owner is None:  # released meanwhile
                continue
            if _stale(owner, file.parent):
                _remove(file, owner)
                continue
        except OSError as error:
            raise write_error(file, error) from error
        message = (
            f"{what or path} is in use by process {owner.get('pid', '?')} on "
            f"{owner.get('host', 'an unknown host')} since {owner.get('since', 'a moment ago')}"
        )
        if time.monotonic() >= deadline:
            raise Busy(f"{message}; wait for it to end, or stop it")
        if not announced:
            logger.info("%s; waiting", message)
            announced = True
        time.sleep(POLL)
    stop, lost = threading.Event(), threading.Event()
    threading.Thread(target=_beat, args=(file, record, stop, lost), daemon=True).start()
    try:
        yield lost
    finally:
        stop.set()
        with suppress(OSError):
            if os.getpid() == record["pid"] and _is_ours(file, record):
                file.unlink()


def owner_of(path: str | Path) -> dict[str, Any] | None:
    """Who owns `path` at this moment ("pid", "host", "since"); None: nobody who is alive."""
    path = Path(path)
    owner = _read(path.with_name(f".{path.name}.lock"))
    return None if owner is None or _stale(owner, path.parent) else owner


def _create(file: Path, record: dict[str, Any]) -> bool:
    try:
        opened = file.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    with opened:
        try:
            opened.write(json.dumps(record))
            opened.flush()
        except OSError:
            file.unlink()
            raise
    return True


def _read(file: Path) -> dict[str, Any] | None:
    """The owner's record and "touched", the file's time; None without a file."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            touched = os.fstat(opened.fileno()).st_mtime  # opened: never from NFS's cache
            text = opened.read()
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # its owner is just writing it, or was killed there
        record = {}
    return (record if isinstance(record, dict) else {}) | {"touched": touched}


def _is_ours(file: Path, record: dict[str, Any]) -> bool:
    return (_read(file) or {}).get("token") == record["token"]


def _stale(owner: dict[str, Any], folder: Path) -> bool:
    pid = owner.get("pid")
    known = isinstance(pid, int) and 0 < pid < 1 << 31  # what a damaged file says need not be
    if known and owner.get("machine") and owner["machine"] == _machine():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            return False
        return _started(pid) != owner.get("started")
    with tempfile.TemporaryFile(dir=folder) as probe:  # the file system's clock, not ours
        return os.fstat(probe.fileno()).st_mtime - owner["touched"] > STALE


def _remove(file: Path, owner: dict[str, Any]) -> None:
    """Remove a stale lock, unless somebody else was faster."""
    guard = f"{file}.takeover"
    try:
        with SoftFileLock(guard, timeout=GUARD):
            if _read(file) == owner:
                file.unlink()
    except Timeout:
        raise UserError(f"{guard} was left by a process that was killed; remove it") from None


def _machine() -> str | None:
    """Names what process ids refer to: boot and container; None where the system does not say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None for one that has ended."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = state.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def _beat(file: Path, record: dict[str, Any], stop: threading.Event, lost: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):  # a network file system may be away for a while
            if not _is_ours(file, record):
                if not stop.is_set():
                    lost.set()
                    logger.error("%s was lost: this process was suspended for too long", file)
                return
            os.utime(file)
