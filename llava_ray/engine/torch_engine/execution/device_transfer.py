"""Small tensors on their way to a device and back, without the program waiting for the device.

A GPU works behind the program that asks it to. An ordinary copy from or to the CPU waits until it
has done all that it was asked; these do not.
"""

import time
from typing import Any

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
    """Brings tensors to the CPU as they are once the device has done what it was asked so far."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            self._tensors = tuple(each.to("cpu", non_blocking=True) for each in tensors)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[torch.Tensor, ...]:
        """Return them; waits for them alone, not for what the device was asked since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
