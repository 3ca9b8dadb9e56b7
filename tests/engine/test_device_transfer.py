"""Copies from a GPU are waited for on the GPU that makes them; stand-ins, no GPU is needed."""

import torch

from llava_ray.engine.torch_engine.execution.device_transfer import DeviceToHostCopy


class TensorOnSecondGpu:
    is_cuda = True
    device = torch.device("cuda:1")

    def to(self, *_, **__):
        return self


def test_a_copy_is_complete_when_the_stream_of_its_own_device_has_passed(monkeypatch):
    """Recorded on the current device, cuda:0, the event would wait for nothing."""
    recorded = []

    class Event:
        def record(self, stream="the current device's"):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    DeviceToHostCopy(TensorOnSecondGpu())  # pyright: ignore[reportArgumentType]
    assert recorded == ["stream of cuda:1"]
