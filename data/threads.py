"""Clips of a batch side by side on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def for_each_clip(function: Callable[[int], None], clips: int) -> None:
    """Call `function` with 0..clips - 1, on as many threads as torch may use; wait for all.

    Within such a thread torch computes alone, without gradients. Threads that share every single
    operation, torch's way, wait for each other some hundred times a clip, which on a busy machine
    takes most of the time.
    """
    threads = torch.get_num_threads()
    if min(threads, clips) < 2:
        for number in range(clips):
            function(number)
        return
    # The number of threads is each thread's own; it is also the default of threads yet to come,
    # which is put back.
    with ThreadPoolExecutor(min(threads, clips), initializer=_alone) as pool:
        list(pool.map(function, range(clips)))
    torch.set_num_threads(threads)


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
