"""Building a waveform store: once, in parallel, resumable, all or nothing.

The store grows in `<name>.building/` beside its final place, under a lock that a second process
waits for, and is renamed when everything is on the disk. `done.jsonl` there has one line per
finished recording; a line is written after the samples it speaks of have been synced, so a
killed build goes on behind the last line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from data.audio import RESAMPLERS, BadRecording, read_recording, resample, silent_cycles
from data.store import StorePlan, WaveformStore, fingerprint, open_folder
from utils.common.errors import UserError

log = logging.getLogger(__name__)

#: An annotation may end this much (s) after its recording: times are rounded to the millisecond,
#: some by hand. Of the real recordings at hand none ends late at all.
END_TOLERANCE = 0.05
#: Seconds between two syncs, so what a power cut costs.
SYNC_SECONDS = 5.0
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
    progress: bool = True,
) -> WaveformStore:
    """Open the store of a cycle table; build it first if there is none yet.

    Args:
        table: cycle table with the columns Filename, CycleStart, CycleEnd (s) and Recording.
        cache_dir: folder that holds the stores; made if absent.
        sample_rate: Hz.
        resampler: "torchaudio" or "soxr_hq".
        workers: processes that build; 0: one per core.
        on_bad_recording: "error" stops at the first recording that can not be used; "skip" leaves
            its cycles out, and says so.
        progress: show a bar while building (on a terminal only).

    Raises:
        UserError: a bad or missing recording, no room, a cache folder that can not be written.
    """
    if resampler not in RESAMPLERS or on_bad_recording not in ("error", "skip"):
        raise ValueError(f"resampler {resampler!r}, on_bad_recording {on_bad_recording!r}?")
    plan = StorePlan.of(table, sample_rate, resampler)
    folder = plan.find(Path(cache_dir))
    if folder is None:
        folder = build_store(plan, Path(cache_dir), workers, on_bad_recording, progress)
    return open_folder(folder, plan, on_bad_recording)


def build_store(
    plan: StorePlan, cache_dir: Path, workers: int, on_bad_recording: str, progress: bool
) -> Path:
    """Build the store of a plan in cache_dir and return its folder; arguments as `open_store`."""
    final = cache_dir / f"waveforms-{plan.key}"
    needed = 4 * plan.samples
    with _storage_errors(cache_dir, needed):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{final.name}.lock"):
            if final.is_dir():  # another process was faster
                return final
            building = cache_dir / f"{final.name}.building"
            building.mkdir(exist_ok=True)
            _reserve(building / "samples.f32", needed)
            results = _fill(plan, building, workers, on_bad_recording, progress)
            _finish(plan, building, results)
            building.rename(final)
            _sync(cache_dir)
        _remove_abandoned(plan, cache_dir)
    log.info("waveform store of %d cycles written to %s", len(plan.starts), final)
    return final


@contextlib.contextmanager
def _storage_errors(cache_dir: Path, needed: int) -> Iterator[None]:
    """Say what to do when the cache folder can not take the store."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the waveform store can not be written to {cache_dir} ({error.strerror or error}); it "
            f"needs {needed / 1e9:.2f} GB. Make room or set dataset.cache_dir to another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process builds this waveform store; waiting for it (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(plan: StorePlan, cache_dir: Path) -> None:
    """Remove unfinished stores of the same cycles, of recordings that have changed since."""
    for building in cache_dir.glob(f"waveforms-{plan.table_key}-*.building"):
        with (cache_dir / f"{building.stem}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody is at it
                continue
            shutil.rmtree(building, ignore_errors=True)  # it may just have been finished


def _reserve(path: Path, size: int) -> None:
    """Make the file its full size, with blocks behind it: a full disk shows now, not later."""
    with path.open("ab") as file:
        present = os.fstat(file.fileno()).st_blocks * 512
        free = shutil.disk_usage(path.parent).free
        if free < size - present:
            raise OSError(f"{free / 1e9:.2f} GB are free")
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS has none; the check above must do
            file.truncate(size)


def _fill(
    plan: StorePlan, building: Path, workers: int, on_bad_recording: str, progress: bool
) -> dict[int, dict]:
    """Write the cycles of all recordings that are not done yet; results by recording number."""
    journal = building / "done.jsonl"
    results = _read_journal(journal)
    todo = [number for number in range(len(plan.recordings)) if number not in results]
    if results:
        log.info("%d of %d recordings are done already", len(results), len(plan.recordings))
    bar = tqdm(total=len(plan.recordings), initial=len(results), unit="recording",
               desc="waveform store", disable=None if progress else True)  # fmt: skip
    samples = building / "samples.f32"
    fresh: list[dict] = []
    last = time.monotonic()
    with bar, samples.open("r+b") as file, journal.open("a") as lines:

        def commit() -> None:
            os.fsync(file.fileno())
            lines.writelines(json.dumps(result) + "\n" for result in fresh)
            lines.flush()
            os.fsync(lines.fileno())
            fresh.clear()

        try:
            for result in _process(plan, todo, samples, workers):
                if result["bad"] and on_bad_recording == "error":
                    raise BadRecording(f"{result['bad']}, or set dataset.on_bad_recording: skip")
                results[result["number"]] = result
                fresh.append(result)
                bar.update()
                if time.monotonic() - last > SYNC_SECONDS:
                    commit()
                    last = time.monotonic()
        finally:
            commit()
    return results


def _read_journal(path: Path) -> dict[int, dict]:
    """Results of an earlier, unfinished build; a half-written last line does not count."""
    results = {}
    if path.exists():
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            try:
                result = json.loads(line)
                results[result["number"]] = result
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path.parent} is damaged ({path.name}: {error}); delete it, it will be "
                    "built again"
                ) from error
    return results


def _process(plan: StorePlan, todo: list[int], samples: Path, workers: int) -> Iterator[dict]:
    """Results as they come, from worker processes, or from this one when there is little to do."""
    workers = min(workers or os.cpu_count() or 1, max(1, len(todo) // MIN_PER_WORKER))
    jobs = ({**plan.job(number), "samples": str(samples)} for number in todo)
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
                "a process that built the waveform store died (out of memory?); start again, it "
                "goes on where it stood; dataset.store_workers: 1 needs the least memory"
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
        {"number", "lengths": samples of each cycle, "bad": reason or None, "channels", "silent":
        cycles of equal samples}.

    Raises:
        UserError: the file is no longer the one that the store's key speaks of.
    """
    bad, cycles, silent = None, [], 0
    try:
        cycles, silent = cut_cycles(job)
    except BadRecording as error:
        bad = str(error)
    if fingerprint(Path(job["path"])) != job["print"]:
        raise UserError(
            f"{job['path']} changed while the waveform store was built; start again when nothing "
            f"writes to the recordings any more"
        )
    lengths = [len(cycle) for cycle in cycles] or [0] * len(job["starts"])
    if bad:
        return {"number": job["number"], "lengths": lengths, "bad": bad, "channels": 0, "silent": 0}
    with Path(job["samples"]).open("r+b") as file:
        for offset, cycle in zip(job["offsets"], cycles, strict=True):
            file.seek(4 * offset)
            file.write(cycle.tobytes())
    return {
        "number": job["number"],
        "lengths": lengths,
        "bad": None,
        "channels": soundfile.info(job["path"]).channels,
        "silent": silent,
    }


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
            f"{job['path']} is {len(samples) / sample_rate:.3f} s long, but its annotation goes on "
            f"to {max(job['ends']) / sample_rate:.3f} s; get both files again or leave them out"
        )
    cycles = [samples[a:b] for a, b in zip(job["starts"], job["ends"], strict=True)]
    return cycles, silent


def _finish(plan: StorePlan, building: Path, results: dict[int, dict]) -> None:
    """Write the index and bring everything to the disk."""
    lengths = np.zeros(len(plan.starts), np.int64)
    for number, rows in enumerate(plan.cycles):
        lengths[rows] = results[number]["lengths"]
    np.save(building / "cycles.npy", np.stack([plan.offsets, lengths]))
    mixed = [plan.recordings[n] for n in results if results[n]["channels"] > 1]
    if mixed:
        log.warning(
            "%d recordings have several channels, whose mean is used: %s%s",
            len(mixed),
            mixed[0],
            ", ..." if len(mixed) > 1 else "",
        )
    muted = [plan.recordings[n] for n in results if results[n]["silent"]]
    if muted:
        count = sum(result["silent"] for result in results.values())
        log.warning("%d cycles are silent throughout, the first in %s", count, muted[0])
    bad = [results[n]["bad"] for n in range(len(plan.recordings)) if results[n]["bad"]]
    index = {"settings": plan.settings, "prints": plan.prints, "bad": bad}
    (building / "index.json").write_text(json.dumps(index))
    (building / "done.jsonl").unlink()
    for path in (building / "cycles.npy", building / "index.json", building):
        _sync(path)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
