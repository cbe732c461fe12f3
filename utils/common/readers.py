"""Files that people, disks and other programs change: read, or refused in one sentence."""

from __future__ import annotations

import codecs
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.common.errors import UserError
from utils.common.files import check_sum

if TYPE_CHECKING:
    import pandas as pd

AGAIN = "evaluate the run again"
#: UTF-32's marks first: UTF-16's is the beginning of one of them.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | Path, remedy: str, fallback: str | None = None) -> str:
    """Text of a file: UTF-8 with or without a byte-order mark, else in the encoding `fallback`.

    Raises:
        UserError: it cannot be read, or is in another encoding, which is named.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if name := _other_encoding(content):
        raise UserError(f"{path} is {name} text; save it as UTF-8")
    if b"\0" in content:
        place = content.index(b"\0")
        raise UserError(f"{path} is damaged or no text (a NUL byte at {place}); {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback:
            return content.decode(fallback)
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); {remedy}") from None


def _other_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or by where the zeros of Latin letters lie."""
    head = content[:400]
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    zeros = [head[start::4].count(0) > len(head) // 8 for start in range(4)]
    return {2: "UTF-16", 3: "UTF-32"}.get(sum(zeros)) if len(head) > 3 else None


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: missing, not JSON, or no object.
    """
    try:
        content = json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; {remedy}")
    return content


def read_results(path: str | Path) -> dict[str, Any]:
    """A report that a run or an evaluation wrote.

    Raises:
        UserError: as `read_json`, or it has changed since (SHA256SUMS).
    """
    check_sum(path)
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; finish the run by the command that began it")
    return read_json(path, AGAIN)


@contextmanager
def understood(path: str | Path, remedy: str) -> Iterator[None]:
    """Context in which content that is not what was expected is an error in words.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is damaged: {what}; {remedy}") from None


def read_csv(path: str | Path, remedy: str, **options: Any) -> pd.DataFrame:
    """pandas.read_csv of a table whose first line names every column.

    Raises:
        UserError: missing, no UTF-8 CSV, or rows with more cells than the first line has names.
    """
    import pandas as pd

    text = read_text(path, remedy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # without index_col, all cells of longer rows would move over
            return pd.read_csv(StringIO(text), index_col=False, **options)
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path}: rows have more cells than the first line has names; name every column, and "
            "put quotes around a cell with commas"
        ) from None
    except ValueError as error:  # pandas' parser errors, too
        raise UserError(f"{path} cannot be read as CSV ({str(error).strip()}); {remedy}") from None
