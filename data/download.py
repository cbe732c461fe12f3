"""Fetch ICBHI 2017: the archive of recordings and the three tables beside it.

    python -m data.download --output DIR [--zip FILE]

Broken-off downloads are taken up where they stopped, sizes are checked, SHA-256 sums are recorded
in DIR/SHA256SUMS (`sha256sum -c` reads it), the archive is unpacked safely and the counts of the
database are verified. The data is for research, under the database's own terms.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.corpora.icbhi import BASE_URL, TABLES, Completeness, completeness, find_table, read_cycles
from utils.common.cli import EXIT_INTERRUPTED, command
from utils.common.errors import UserError
from utils.common.files import atomic_write, write_error, write_text

log = logging.getLogger(__name__)

ARCHIVE = "ICBHI_final_database.zip"
#: Sizes in bytes where they are known.
SIZES: dict[str, int] = {
    ARCHIVE: 1_978_998_275,
    "ICBHI_Challenge_demographic_information.txt": 2_586,
}
CHECKSUMS = "SHA256SUMS"
MAX_TABLE = 1 << 20  # bytes, of a file whose size is not known
MAX_MEMBER = 1 << 28  # bytes, of one unpacked file; the longest recording has about 15 MB
MAX_UNPACKED = 1 << 33  # bytes, of all of them
MAX_MEMBERS = 10_000
_BLOCK = 1 << 20  # bytes read at a time


class _Interrupted(Exception):
    """The connection broke; what has arrived is kept and the rest can be asked for."""


def download(
    output: str | Path,
    *,
    archive: str | Path | None = None,
    base_url: str = BASE_URL,
    sizes: dict[str, int] | None = None,
    attempts: int = 5,
    wait: float = 2.0,
) -> Completeness:
    """Fetch, check and unpack everything into `output`; what is there already is kept.

    Args:
        output: folder; becomes `dataset.data_folder`.
        archive: an archive that is on this machine already; it is not fetched then.
        base_url: where the four files lie, with a slash at the end.
        sizes: expected bytes per file name, `SIZES` by default.
        attempts: per file, each taking up where the one before broke off.
        wait: s before the second attempt, growing with each.

    Returns:
        how the unpacked recordings compare with the whole database.

    Raises:
        UserError: no connection, a wrong size, a damaged or unsafe archive, a full disk.
    """
    output = Path(output)
    sizes = SIZES if sizes is None else sizes
    _make(output)
    for kind, names in TABLES.items():
        if find_table(output, kind) is None:
            fetch(base_url, names[0], output, sizes.get(names[0]), attempts, wait)
    if archive is None:
        archive = fetch(base_url, ARCHIVE, output, sizes.get(ARCHIVE), attempts, wait)
    elif not Path(archive).is_file():
        raise UserError(f"{archive} does not exist; give the downloaded {ARCHIVE} with --zip")
    unpack(archive, output)
    return completeness(read_cycles(output))


def fetch(
    base_url: str, name: str, output: Path, size: int | None, attempts: int, wait: float
) -> Path:
    """Fetch one file into `output`, by way of `<name>.part`; a whole one is checked and kept.

    Raises:
        UserError: it can not be fetched, or is not what it should be.
    """
    path, part = output / name, output / f"{name}.part"
    if path.exists():
        _check_existing(path, size)
        return path
    for attempt in range(attempts):
        try:
            _fetch_rest(base_url + name, part, size)
            break
        except _Interrupted as error:
            reason = error
            log.warning("%s: %s (attempt %d of %d)", name, error, attempt + 1, attempts)
            if attempt + 1 < attempts:
                time.sleep(wait * (attempt + 1))
    else:
        raise UserError(
            f"{base_url}{name} can not be fetched: {reason}; check the connection and run the "
            f"command again (it goes on where it stopped), or fetch {name} elsewhere, put it into "
            f"{output} or pass the archive with --zip"
        )
    _refuse_page(part, base_url + name)
    checksum = _sha256(part)
    part.replace(path)
    _record(output, name, checksum)
    log.info("%s: %d bytes, sha256 %s", path, path.stat().st_size, checksum)
    return path


def _fetch_rest(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what it lacks.

    Raises:
        _Interrupted: the connection could not be made or broke.
        UserError: the server answers with something else than this file.
    """
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have > size:
        part.unlink()
        have = 0
    if size is not None and have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "icbhi-download"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            start, total = _announced(response, have, url)
            _check_announced(url, total, size)
            _receive(response, part, start, total if total is not None else size)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing behind what is there, so it belongs to another file
            part.unlink(missing_ok=True)
            raise _Interrupted("the part that was there does not fit, starting anew") from error
        if error.code >= 500 or error.code in (408, 429):
            raise _Interrupted(f"the server answers {error.code}") from error
        reason = " ".join(str(error.reason).split())
        raise UserError(
            f"{url}: the server answers {error.code} {reason}; look for the file's new "
            "address on the database's page"
        ) from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise _Interrupted(reason or type(error).__name__) from error


def _announced(response: HTTPResponse, have: int, url: str) -> tuple[int, int | None]:
    """(first byte the answer holds, size of the whole file or None) by the answer's headers."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    answer = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer)
    if match is None or int(match[1]) != have:
        raise UserError(
            f"{url}: asked for bytes from {have} on, the server answers '{answer}'; delete the "
            ".part file and run the command again"
        )
    return have, None if match[2] == "*" else int(match[2])


def _check_announced(url: str, total: int | None, size: int | None) -> None:
    if size is not None and total is not None and total != size:
        raise UserError(
            f"{url}: the server announces {total:,} bytes, {size:,} expected; the file has changed "
            "or a proxy answers in its place: fetch it with a browser and look at it"
        )
    if size is None and total is not None and total > MAX_TABLE:
        raise UserError(f"{url}: the server announces {total:,} bytes for a small table; not taken")


def _receive(response: HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Write the answer's body behind byte `start` of `part`, never more than is wanted."""
    limit = MAX_TABLE if total is None else total
    if total is not None:
        _check_space(part.parent, total - start)
    try:
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=None,
                ncols=100,
            ) as bar,
        ):
            have = start
            while block := _next_block(response):
                if have + len(block) > limit:
                    raise UserError(
                        f"{response.url}: more than the expected {limit:,} bytes arrive; not "
                        "taken, fetch it with a browser and look at it"
                    )
                file.write(block)
                have += len(block)
                bar.update(len(block))
    except OSError as error:
        raise write_error(part, error, total) from error
    if total is not None and have < total:
        raise _Interrupted(f"broke off after {have:,} of {total:,} bytes")


def _refuse_page(part: Path, url: str) -> None:
    """A log-in page or nothing arrives with status 200 too; none of the files begins like that."""
    with part.open("rb") as file:
        begin = file.read(256).lstrip()
    if not begin or begin.startswith(b"<"):
        part.unlink()
        what = "a web page" if begin else "nothing"
        raise UserError(
            f"{url}: {what} arrives in place of the file; log in, or fetch it with a browser"
        )


def _next_block(response: HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except (HTTPException, OSError) as error:  # OSError here is the network's, not the disk's
        raise _Interrupted(str(error) or type(error).__name__) from error


def unpack(archive: str | Path, output: str | Path) -> int:
    """Unpack the recordings into `output`; files that are whole already are left alone.

    Every entry is looked at before the first is written.

    Returns:
        how many files were written.

    Raises:
        UserError: the archive is damaged, or holds what a recordings' archive does not hold (paths
            out of the folder, links, absurd sizes, encrypted entries).
    """
    output = Path(output)
    damaged = f"{archive} is damaged; delete it and run the command again"
    try:
        with zipfile.ZipFile(archive) as content:
            members = [entry for entry in content.infolist() if not entry.is_dir()]
            _check_members(archive, members)
            targets = [output.joinpath(*PurePosixPath(entry.filename).parts) for entry in members]
            _check_inside(output, targets)
            todo = [
                (entry, target)
                for entry, target in zip(members, targets, strict=True)
                if not (target.is_file() and target.stat().st_size == entry.file_size)
            ]
            _check_space(output, sum(entry.file_size for entry, _ in todo))
            for entry, target in tqdm(todo, desc="unpack", unit="file", disable=None, ncols=100):
                with content.open(entry) as source, atomic_write(target) as file:
                    shutil.copyfileobj(source, file, _BLOCK)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{damaged} ({error})") from error
    except OSError as error:
        raise UserError(f"{archive} can not be unpacked ({error}); check the file") from error
    return len(todo)


def _check_members(archive: str | Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive with an entry that could do harm."""
    refused = f"{archive} is refused"
    remedy = "fetch the original archive"
    if len(members) > MAX_MEMBERS:
        raise UserError(f"{refused}: {len(members):,} files, at most {MAX_MEMBERS:,}; {remedy}")
    names = set()
    for entry in members:
        path = PurePosixPath(entry.filename)
        mode = entry.external_attr >> 16
        reason = None
        if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\x00]", entry.filename):
            reason = "leads out of the folder"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            reason = "is a link or a special file"
        elif entry.flag_bits & 1:
            reason = "is encrypted"
        elif entry.file_size > MAX_MEMBER:
            reason = f"has {entry.file_size:,} bytes, at most {MAX_MEMBER:,}"
        elif entry.filename.lower() in names:
            reason = "is there twice"
        if reason:
            raise UserError(f"{refused}: its entry '{entry.filename}' {reason}; {remedy}")
        names.add(entry.filename.lower())
    total = sum(entry.file_size for entry in members)
    if total > MAX_UNPACKED:
        raise UserError(f"{refused}: {total:,} bytes unpacked, at most {MAX_UNPACKED:,}; {remedy}")


def _check_inside(output: Path, targets: list[Path]) -> None:
    """Refuse to write through a link in the output folder that leads elsewhere."""
    root = output.resolve()
    for folder in {target.parent for target in targets}:
        if not folder.resolve().is_relative_to(root):
            raise UserError(f"{folder} leads out of {output}; remove the link and run it again")


def _check_existing(path: Path, size: int | None) -> None:
    """A file from an earlier call must be whole and unchanged."""
    have = path.stat().st_size
    if size is not None and have != size:
        raise UserError(
            f"{path} has {have:,} bytes, {size:,} expected; delete it, or rename it to "
            f"{path.name}.part to fetch the rest"
        )
    recorded = _recorded(path.parent).get(path.name)
    if recorded is not None and recorded != _sha256(path):
        raise UserError(
            f"{path} has changed since it was fetched (sha256 in {CHECKSUMS}); delete it and run "
            "the command again"
        )


def _recorded(output: Path) -> dict[str, str]:
    """{file name: sha256} of the files fetched so far."""
    path = output / CHECKSUMS
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {line[1]: line[0] for line in lines if len(line) == 2}


def _record(output: Path, name: str, checksum: str) -> None:
    sums = {**_recorded(output), name: checksum}
    text = "".join(f"{value}  {key}\n" for key, value in sorted(sums.items()))
    write_text(output / CHECKSUMS, text)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make room "
            "or choose another --output"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error


@command
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__)
    parser.add_argument("--output", required=True, help="folder to fill")
    parser.add_argument("--zip", help=f"an {ARCHIVE} that is on this machine already")
    parser.add_argument("--base-url", default=BASE_URL, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        state = download(options.output, archive=options.zip, base_url=options.base_url)
    except KeyboardInterrupt:
        log.warning("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    if state.partial:
        raise UserError(f"{state.message}; fetch the archive again")
    log.info("complete: 920 recordings, 6,898 cycles in %s", options.output)
    return None


if __name__ == "__main__":
    sys.exit(main())
