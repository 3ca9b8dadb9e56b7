"""Stand-ins for torch.cuda where there is no GPU."""

from collections.abc import Callable

import torch


def pretend_gpu(
    monkeypatch,
    *,
    name: str = "NVIDIA H200",
    capability: tuple[int, int] = (9, 0),
    count: int = 1,
    failure: str | None = None,
) -> None:
    """Let torch see GPUs that cannot compute.

    Args:
        monkeypatch: pytest's.
        count: how many are visible.
        failure: what starting CUDA raises, if it fails.
    """

    def start() -> None:
        if failure:
            raise RuntimeError(failure)

    answers: dict[str, Callable] = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "init": start,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
    }
    for function, answer in answers.items():
        monkeypatch.setattr(torch.cuda, function, answer)
