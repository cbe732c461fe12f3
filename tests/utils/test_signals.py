"""What interrupts the loop: SIGTERM, the clock, and gradients that are not finite."""

from __future__ import annotations

import signal

import pytest
import torch

from utils.common.errors import Preempted
from utils.training.signals import Signals


def test_flags_come_one_step_late_and_keep_their_rows():
    with pytest.raises(Preempted), Signals(torch.device("cpu"), 1, 1e9) as signals:
        assert signals.post(torch.ones(()), torch.tensor([4, 5])) is None
        flags = signals.post(torch.zeros(()), torch.tensor([6]))
        assert flags.nonfinite
        assert flags.rows.tolist() == [4, 5]
        later = signals.drain()
        assert not later.nonfinite
        assert later.rows.tolist() == [6]
        assert signals.drain() is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.now().stop
        raise Preempted


def test_a_checkpoint_is_due_after_the_interval_and_not_before(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("utils.training.signals.time.monotonic", lambda: clock[0])
    signals = Signals(torch.device("cpu"), 1, 60.0)
    clock[0] = 159.0
    assert not signals.now().save
    clock[0] = 160.0
    assert signals.now().save
    signals.saved()
    assert not signals.now().save


def test_a_sigterm_after_the_last_look_is_handed_on():
    caught = []
    previous = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    try:
        with Signals(torch.device("cpu"), 1, 1e9):
            signal.raise_signal(signal.SIGTERM)
            assert not caught
        assert caught == [True]
        with pytest.raises(Preempted), Signals(torch.device("cpu"), 1, 1e9):
            signal.raise_signal(signal.SIGTERM)
            raise Preempted
        assert caught == [True]  # it was heeded: nothing to hand on
    finally:
        signal.signal(signal.SIGTERM, previous)
