"""Fetch ICBHI 2017: the archive of recordings and its three tables.

    python -m data.download --output DIR [--zip FILE]

Interrupted downloads are resumed; sizes and counts are checked. The database's own terms apply.
"""

from __future__ import annotations

import argparse
import errno
import logging
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from data.corpora.icbhi import BASE_URL, TABLES, completeness, find_table, read_cycles
from data.cycle_table import Completeness
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import atomic_write, write_error

log = logging.getLogger(__name__)

ARCHIVE = "ICBHI_final_database.zip"
SIZES = {ARCHIVE: 1_978_998_275, "ICBHI_Challenge_demographic_information.txt": 2_586}
MAX_TABLE = 1 << 20  # bytes, of a file whose size is not known
MAX_UNPACKED = 1 << 33  # bytes, of all files; the recordings have about 3.5 GB


def download(
    output: Path, archive: Path | None = None, base_url: str = BASE_URL, wait: float = 2.0
) -> Completeness:
    """Fetch and unpack everything into `output`, except what is there and an `archive` given."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(output, error) from error
    for kind, names in TABLES.items():
        if find_table(output, kind) is None:
            fetch(base_url, names[0], output, wait)
    unpack(archive or fetch(base_url, ARCHIVE, output, wait), output)
    return completeness(read_cycles(output))


def fetch(base_url: str, name: str, output: Path, wait: float, attempts: int = 5) -> Path:
    """Fetch one file into `output`, by way of `<name>.part`, which a later call continues."""
    path, part, size = output / name, output / f"{name}.part", SIZES.get(name)
    if path.exists():
        if size in (None, path.stat().st_size):
            return path
        raise UserError(f"{path} has not {size:,} bytes; delete it, or rename it to {part.name}")
    for attempt in range(1, attempts + 1):
        try:
            _fetch_rest(base_url + name, part, size)
            break
        except (OSError, HTTPException) as error:
            reason, code = error, error.code if isinstance(error, HTTPError) else 0
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise write_error(part, error, size) from error
            if code == 416:  # nothing after what is there: that was part of another file
                part.unlink(missing_ok=True)
            elif 400 <= code < 500 and code not in (408, 429):
                raise UserError(f"{base_url}{name}: {error}; has the address changed?") from error
        log.warning("%s: %s (attempt %d of %d)", name, reason, attempt, attempts)
        time.sleep(wait * attempt if attempt < attempts else 0)
    else:
        raise UserError(
            f"{base_url}{name} cannot be fetched: {reason}; check the connection and run this "
            f"again (it resumes), or fetch {name} elsewhere and put it into {output}"
        )
    with part.open("rb") as file:
        begin = file.read(256).lstrip()
    if not begin or begin.startswith(b"<"):  # a log-in page arrives with status 200, too
        part.unlink()
        raise UserError(f"{base_url}{name} sends a web page or nothing; fetch it with a browser")
    return part.replace(path)


def _fetch_rest(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what it lacks; after an OSError or HTTPException it can be called again."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    with urlopen(Request(url, headers=headers), timeout=30) as answer:
        if answer.status != 206:  # the server cannot resume: everything once more
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sends another part than was asked for")
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else size
        limit = size or MAX_TABLE
        if (size and total != size) or (total or 0) > limit:
            raise UserError(f"{url} has {total:,} bytes, {limit:,} expected; look at its web page")
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
        with part.open("ab" if have else "wb") as file, bar:
            while block := answer.read(1 << 20):
                have += file.write(block)
                bar.update(len(block))
                if have > limit:
                    raise UserError(f"{url} sends more than {limit:,} bytes; look at its web page")
    if have < (total or 0):
        raise ConnectionError(f"the connection broke after {have:,} of {total:,} bytes")


def unpack(archive: Path, output: Path) -> None:
    """Unpack the recordings into `output`, where they are not whole already."""
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            if (total := sum(entry.file_size for entry in entries)) > MAX_UNPACKED:
                raise UserError(f"{archive} unpacks to {total:,} bytes; fetch the original archive")
            for entry in tqdm(entries, desc="unpack", unit="file", disable=None):
                target = (output / entry.filename).resolve()
                if not target.is_relative_to(output.resolve()):
                    raise UserError(f"{archive}: '{entry.filename}' leads out of {output}")
                if not target.is_file() or target.stat().st_size != entry.file_size:
                    with content.open(entry) as source, atomic_write(target) as file:
                        shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run again") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error})") from error


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder to fill")
    parser.add_argument("--zip", type=Path, help=f"an {ARCHIVE} that is on this machine already")
    options = parser.parse_args(arguments)
    if (state := download(options.output, options.zip)).partial:
        raise UserError(f"{state.message}; fetch the archive again")
    log.info("complete: 920 recordings, 6,898 cycles in %s", options.output)


if __name__ == "__main__":
    sys.exit(main())
