"""Measures how long a device works on something, without waiting for it in between."""

import time

import torch


class Stopwatch:
    """Runs from its making to `stop`.

    A GPU works behind the program that asks it to: there the time is that between two marks that
    it passes, and `read` waits for the second of them alone, not for what was asked since.

    Args:
        device: it does what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._times_s: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._mark()

    def stop(self) -> None:
        """All that is measured has been asked for."""
        self._mark()

    def read(self) -> float:
        """Return the seconds from start to stop."""
        if self._stream is None:
            start_s, end_s = self._times_s
            return end_s - start_s
        start, end = self._events
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _mark(self) -> None:
        if self._stream is None:
            self._times_s.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._events.append(event)
