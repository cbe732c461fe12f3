"""Building a waveform store: once, in parallel, all or nothing.

The store grows in `<name>.building/` next to its final place, under a lock that a second process
waits for, and is renamed when everything is on the disk. A build that was killed starts again
from scratch: the whole database takes about five minutes on two cores.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from data.audio import BadRecording, read_recording, resample, silent_cycles
from data.store import StorePlan, WaveformStore, checksum, fingerprint, open_folder
from utils.common.errors import Busy, UserError
from utils.common.lock import held

log = logging.getLogger(__name__)

#: An annotation may end this much (s) after its recording: times are rounded to the millisecond,
#: some by hand. Of the real recordings at hand none ends late at all.
END_TOLERANCE = 0.05
#: Recordings per process below which starting one costs more than it saves.
MIN_PER_WORKER = 8


def open_store(
    table: pd.DataFrame,
    *,
    cache_dir: str | Path,
    sample_rate: int = 16000,
    resampler: str = "torchaudio",
    workers: int = 0,
    on_bad_recording: str = "error",
    full_hash: bool = False,
    progress: bool = True,
) -> WaveformStore:
    """Open the store of a cycle table; build it first if there is none yet.

    Args:
        table: cycle table with the columns Filename, CycleStart, CycleEnd (s) and Recording.
        cache_dir: folder that holds the stores; made if absent.
        sample_rate: Hz.
        resampler: "torchaudio" or "soxr_hq".
        workers: processes that build; 0: one per core.
        on_bad_recording: "error" stops at the first recording that cannot be used; "skip" leaves
            its cycles out, and says so.
        full_hash: know the recordings again by all their bytes.
        progress: show a bar while building (on a terminal only).

    Raises:
        UserError: a bad or missing recording, no room, a cache folder that cannot be written.
    """
    plan = StorePlan.of(table, sample_rate, resampler, full_hash)
    final = Path(cache_dir) / plan.name
    if not final.is_dir():
        try:
            _build(plan, final, workers, on_bad_recording, progress)
        except OSError as error:
            raise UserError(
                f"the waveform store cannot be written to {cache_dir} ({error.strerror or error}); "
                f"it needs {4 * plan.samples / 1e9:.2f} GB. Make room or set dataset.cache_dir to "
                "another folder"
            ) from error
    return open_folder(final, plan, on_bad_recording)


def _build(
    plan: StorePlan, final: Path, workers: int, on_bad_recording: str, progress: bool
) -> None:
    """Build the store of a plan in the folder `final`; arguments as `open_store`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob("waveforms-*.building"):  # by a killed build
        with suppress(Busy), held(left.with_suffix("")):
            shutil.rmtree(left, ignore_errors=True)
    with held(final, "the waveform store being built", wait=True):
        if final.is_dir():  # another process was faster
            return
        building = final.with_suffix(".building")
        building.mkdir()
        try:
            _reserve(building / "samples.f32", 4 * plan.samples)
            results = {}
            bar = tqdm(total=len(plan.recordings), unit="recording", desc="waveform store",
                       disable=None if progress else True)  # fmt: skip
            with bar:
                for result in _process(plan, building / "samples.f32", workers):
                    if result["bad"] and on_bad_recording == "error":
                        raise BadRecording(
                            f"{result['bad']}, or set dataset.on_bad_recording: skip"
                        )
                    results[result["number"]] = result
                    bar.update()
            _finish(plan, building, [results[n] for n in range(len(results))])
            building.rename(final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    log.info("waveform store of %d cycles written to %s", len(plan.starts), final)


def _reserve(path: Path, size: int) -> None:
    """Make the file its full size, with blocks allocated: a full disk shows now, not later."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(f"{free / 1e9:.2f} GB are free")
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS has none; the check above must do
            file.truncate(size)


def _process(plan: StorePlan, samples: Path, workers: int) -> Iterator[dict]:
    """Results as they come, from worker processes, or from this one when there is little to do."""
    n = len(plan.recordings)
    workers = min(workers or os.cpu_count() or 1, max(1, n // MIN_PER_WORKER))
    jobs = ({**plan.job(number), "samples": str(samples)} for number in range(n))
    if workers == 1:
        yield from map(write_recording, jobs)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang it
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        futures = [pool.submit(write_recording, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that built the waveform store died (out of memory?); run the command "
                "again; dataset.store_workers: 1 needs the least memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """A worker per core needs no further threads."""
    import torch

    torch.set_num_threads(1)


def write_recording(job: dict) -> dict:
    """Decode one recording and write its cycles to their places in the samples file.

    Returns:
        {"number", "bad": reason or None, "lengths", "checksums": samples and CRC-32 of each
        cycle, "channels", "silent": cycles of equal samples}.
    """
    result = {"number": job["number"], "bad": None, "channels": 0, "silent": 0}
    cycles = []
    try:
        cycles, result["silent"] = cut_cycles(job)
    except BadRecording as error:
        result["bad"] = str(error)
    if fingerprint(Path(job["path"]), job["full_hash"]) != job["print"]:
        raise UserError(
            f"{job['path']} changed while the waveform store was built; run the command again "
            "when nothing writes to the recordings any more"
        )
    if cycles:
        result["channels"] = soundfile.info(job["path"]).channels
    with Path(job["samples"]).open("r+b") as file:
        for offset, cycle in zip(job["offsets"], cycles, strict=False):
            file.seek(4 * offset)
            file.write(cycle.tobytes())
    empty = [0] * len(job["starts"])
    result["lengths"] = [len(cycle) for cycle in cycles] or empty
    result["checksums"] = [zlib.crc32(cycle.tobytes()) for cycle in cycles] or empty
    return result


def cut_cycles(job: dict) -> tuple[list[np.ndarray], int]:
    """One recording's cycles [n] float32 at the working sample rate, and how many are silent.

    Raises:
        BadRecording: see `read_recording`; or an annotation that ends more than END_TOLERANCE
            after the sound does, or begins after it.
    """
    samples, rate = read_recording(job["path"])
    sample_rate = job["sample_rate"]
    # before resampling, which leaves a ripple on a constant
    seconds = [np.divide(job[name], sample_rate) for name in ("starts", "ends")]
    silent = silent_cycles(samples, rate, *seconds)
    samples = resample(samples, rate, sample_rate, job["resampler"])
    late = max(job["ends"]) - len(samples)
    if late > END_TOLERANCE * sample_rate or max(job["starts"]) >= len(samples):
        raise BadRecording(
            f"{job['path']} is {len(samples) / sample_rate:.3f} s long, but its annotation ends "
            f"at {max(job['ends']) / sample_rate:.3f} s; get both files again or leave them out"
        )
    cycles = [samples[a:b] for a, b in zip(job["starts"], job["ends"], strict=True)]
    return cycles, silent


def _finish(plan: StorePlan, building: Path, results: list[dict]) -> None:
    """Write the index and bring everything to the disk."""
    table = np.zeros((3, len(plan.starts)), np.int64)
    table[0] = plan.offsets
    for rows, result in zip(plan.cycles, results, strict=True):
        table[1:, rows] = result["lengths"], result["checksums"]
    pairs = list(zip(plan.recordings, results, strict=True))
    if mixed := [path for path, result in pairs if result["channels"] > 1]:
        log.warning(
            "%d recordings have several channels, whose mean is used: %s", len(mixed), mixed[0]
        )
    if muted := [path for path, result in pairs if result["silent"]]:
        count = sum(result["silent"] for result in results)
        log.warning("%d cycles are silent throughout, the first in %s", count, muted[0])
    (building / "cycles.i64").write_bytes(table.tobytes())
    index = {
        "settings": plan.settings,
        "prints": plan.prints,
        "bad": [result["bad"] for result in results if result["bad"]],
        "cycles": zlib.crc32(table.tobytes()),
    }
    index["checksum"] = checksum(index)
    (building / "index.json").write_text(json.dumps(index))
    for path in (*sorted(building.iterdir()), building):  # fsync
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
