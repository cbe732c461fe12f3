"""Files of tensors, which may come from anyone and be damaged."""

from __future__ import annotations

import zipfile
from pathlib import Path


def check_archive(path: str | Path) -> None:
    """Refuse a file of torch.save that unpacks to more than its size, before anything is unpacked,
    or that is damaged, at which torch itself does not look. Before torch 1.6 it was no archive.

    Raises:
        ValueError: what is wrong with it.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
            raise ValueError("it unpacks to more than its size; torch compresses nothing")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"wrong checksum of {damaged}")
