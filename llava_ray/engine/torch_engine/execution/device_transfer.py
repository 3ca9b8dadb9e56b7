"""Copies between CPU and GPU, and timings, that do not wait for the GPU's queued work.

A GPU runs asynchronously: an ordinary copy, or reading the clock, would first wait for all queued
work. `send` and `DeviceToHostCopy` queue copies, and `Stopwatch` measures with events.
"""

import time
from typing import Any

import torch


class Stopwatch:
    """Measures the time from its construction to `stop`.

    On a GPU this is the time between two CUDA events; `read` waits for the second event only, not
    for work that was queued after it.

    Args:
        device: the device whose work is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._times_s: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._mark()

    def stop(self) -> None:
        """Mark the end of the measured work, which may still be running."""
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


def send(
    numbers: Any, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return numbers, or a tensor of the CPU, as a tensor of a device.

    Args:
        dtype: the tensor's; by default what `torch.as_tensor` takes.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DeviceToHostCopy:
    """Copies tensors to the CPU once the work queued so far has been done."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(each.to("cpu", non_blocking=True) for each in tensors)
            self._arrived = torch.cuda.Event()
            # The copy runs on the tensors' device, which need not be this thread's current one.
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def read(self) -> tuple[torch.Tensor, ...]:
        """Return the copies; waits for them only, not for work that was queued later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
