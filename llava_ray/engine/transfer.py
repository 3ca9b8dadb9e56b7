"""Small tensors on their way to a device and back, without the program waiting for the device.

A GPU works behind the program that asks it to. An ordinary copy from or to the CPU waits until it
has done all that it was asked; these do not.
"""

from typing import Any

import torch


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


class Fetch:
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
