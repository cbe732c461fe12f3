"""Atomic writes: a file is complete or absent. Write a temporary file, flush, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.common.errors import UserError

TEMPORARY = ".*.tmp"  # glob pattern of the files that a killed process may leave
SUMS = "SHA256SUMS"  # of a finished folder; `sha256sum -c SHA256SUMS` reads it, too


@contextmanager
def atomic_write(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Binary file object whose content replaces `path` when the block ends without an error.

    Args:
        path: the final file; its folder is made when it is missing.
        needed_bytes: size to name in the message when the disk is full.

    Raises:
        UserError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save replaces the reason by its own
        if isinstance(error, OSError):
            raise write_error(path, error, needed_bytes) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    content = text.encode()
    with atomic_write(path, needed_bytes=len(content)) as file:
        file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """`atomic_write` of `plain(value)` as indented JSON."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_last(path: str | Path, value: Any, others: Iterable[Path] = ()) -> None:
    """`write_json` of the file that completes a folder, after `SHA256SUMS` has recorded it and
    `others`, which lie in or below the same folder; `check_sum` compares when one is read."""
    path = Path(path)
    text = json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"
    sums = {other.relative_to(path.parent).as_posix(): sha256(other) for other in others}
    sums[path.name] = hashlib.sha256(text.encode()).hexdigest()
    write_text(path.with_name(SUMS), "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    write_text(path, text)


def check_sum(path: str | Path) -> None:
    """Compare a file with `SHA256SUMS` of its folder or the one above, if it is named there.

    Raises:
        UserError: it is missing, or not the file that was written.
    """
    path = Path(path)
    for folder in (path.parent, path.parent.parent):
        value = summed(folder).get(path.relative_to(folder).as_posix())
        if value is not None and not (path.is_file() and sha256(path) == value):
            what = "is not what the run wrote" if path.is_file() else "is missing"
            raise UserError(
                f"{path} {what} ({folder / SUMS} has its checksum); restore it, or repeat the run "
                "with training.resume=never"
            )


def summed(folder: Path) -> dict[str, str]:
    """File -> SHA-256 from `SHA256SUMS` of a folder; empty where there is none, as in runs of
    earlier versions."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plain(value: Any) -> Any:
    """The same data in the types of JSON: no numpy, no tuples; NaN and infinities become None."""
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_error(path: Path, error: OSError, needed_bytes: int | None = None) -> UserError:
    """The sentence for a file that could not be written: path, space needed, remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f"about {_size(needed_bytes)} are" if needed_bytes else "more space is"
        folder = next((p for p in (path.parent, *path.parents) if p.is_dir()), Path("/"))
        free = shutil.disk_usage(folder).free
        return UserError(
            f"the disk is full: {path} cannot be written; {need} needed, "
            f"{_size(free)} are free; make room or choose another folder"
        )
    return UserError(f"{path} cannot be written ({error.strerror or error}); check the folder")


def _size(n: int) -> str:
    return f"{n / 1e6:,.1f} MB" if n >= 100_000 else f"{n / 1e3:,.1f} kB"


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
