"""Any bytes in what a user names: read, or refused in one sentence, within 1 GB of memory.

Annotations and tables of ICBHI as text are in tests/data/test_icbhi.py.
"""

from __future__ import annotations

import io
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.audio import read_recording
from data.corpora.manifest import read_manifest
from data.recordings import Cycles, MetadataTable, read_annotation
from data.stream import Stream
from tests.data.sounds import tone_in_noise
from utils.common.errors import UserError
from utils.config.schema import load_config

GIGABYTE = 1 << 30
FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def one_gigabyte():
    """Context in which more than another gigabyte of address space is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIGABYTE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(call, path: Path):
    """What `call` makes of a file; None where it refuses it in a sentence with the file's name."""
    try:
        with one_gigabyte():
            return call(path)
    except UserError as error:
        text = str(error)
        assert path.stem in text and "Traceback" not in text and len(text) < 2000
        return None


def sound(form: str, subtype: str, channels: int = 1) -> bytes:
    out, one = io.BytesIO(), tone_in_noise(0.1, 8000)
    soundfile.write(out, np.stack([one] * channels, 1), 8000, format=form, subtype=subtype)
    return out.getvalue()


SOUNDS = {
    "wav": sound("WAV", "PCM_16", 2),
    "float": sound("WAV", "FLOAT"),
    "flac": sound("FLAC", "PCM_16"),
    "aiff": sound("AIFF", "PCM_24"),
    "w64": sound("W64", "PCM_16"),
    "ogg": sound("OGG", "VORBIS"),
}
LYING = st.sampled_from([b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"])
PATCH = st.tuples(st.integers(0, 95), st.one_of(st.binary(min_size=1, max_size=4), LYING))


@FUZZ
@given(
    kind=st.sampled_from(sorted(SOUNDS)),
    patches=st.lists(PATCH, min_size=1, max_size=4),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
@example("wav", [(40, b"\xff" * 4)], 1.0)  # length of the data
@example("wav", [(4, b"\x00" * 4), (40, b"\x00" * 4)], 1.0)  # written to a pipe
@example("wav", [(22, b"\xff\xff")], 1.0)  # channels
@example("flac", [(21, b"\xff" * 4)], 1.0)  # samples
@example("aiff", [(22, b"\xff" * 4)], 1.0)
def test_audio_headers(tmp_path, kind, patches, keep):
    content = bytearray(SOUNDS[kind])
    for place, new in patches:
        content[place : place + len(new)] = new
    path = tmp_path / "fuzz.wav"
    path.write_bytes(content[: int(keep * len(content))])
    found = read(read_recording, path)
    stream = read(lambda path: Stream.open(path, 4000, "soxr_hq"), path)
    assert (found is None) == (stream is None)
    if found is not None:
        samples, rate = found
        assert np.isfinite(samples).all() and 0 < len(samples) <= 8 * len(content)
        assert stream.samples == -(-len(samples) * 4000 // rate)


WORDS = """dataset training audio models ast_film data_folder epochs lr n_cls conditioned_layers all
null true ~ 4 1e3 .nan -1 ${oc.env:HOME} ${training.lr} ??? !!python/object &a *a << 2026-11-28 0x1F
1_000 é \x00 \ufeff"""
GLUE = st.sampled_from(
    [": ", "\n", "\n  ", ", ", " ", "- ", "[", "]", "{", "}", '"', "'", "|", "#"]
)
YAMLISH = st.lists(st.one_of(st.sampled_from(WORDS.split()), GLUE, GLUE), max_size=30).map("".join)


@settings(FUZZ, max_examples=60)
@given(st.one_of(YAMLISH.map(str.encode), st.binary(max_size=60)))
@example(b"[" * 3000)
@example("dataset: {h: 12}".encode("utf-16"))
def test_configurations(tmp_path, content):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    try:
        with one_gigabyte():
            assert load_config([path], ["dataset.data_folder=x"], variant="ast_film")
    except UserError as error:
        assert len(str(error)) < 2000


CELL = st.sampled_from(
    ["file", "start", "end", "crackle", "wheeze", "device", "site", "age", "bmi", "patient",
     "split", "", "0", "1", "2.5", "1e400", "nan", "-3", "inf", "a.wav", "../a.wav", "\x00", '"',
     "é", " ", "train"]
)  # fmt: skip
LINE = st.lists(CELL, max_size=6).map(",".join)
TABLE = st.one_of(
    st.lists(LINE, max_size=5).map("\n".join),
    st.lists(LINE, max_size=4).map(lambda lines: "\n".join(["file,start,end,patient", *lines])),
)


@pytest.mark.parametrize("reader", [Cycles, MetadataTable, read_manifest, read_annotation])
@settings(FUZZ, max_examples=80)
@given(st.one_of(TABLE.map(str.encode), st.binary(max_size=60)))
@example("file,start,end\na.wav,0,1\n".encode("utf-16"))
@example(b"file,start,end,patient\n" + b"9" * 5000 + b",0,1,1\n")
def test_tables(reader, tmp_path, content):
    path = tmp_path / "fuzz.csv"
    path.write_bytes(content)
    read(lambda path: [*found] if hasattr(found := reader(path), "__iter__") else found, path)
