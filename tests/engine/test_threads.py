"""The engine's own kernels run on torch's threads."""

import threading

import pytest
import torch

from llava_ray.engine.torch_engine.execution import threads
from llava_ray.engine.torch_engine.execution.threads import run_in_team


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("has_openmp", [True, False])
def test_each_part_is_computed_once(num_parts, has_openmp, monkeypatch):
    if not has_openmp:
        monkeypatch.setattr(threads, "_find_openmp", lambda: None)
    parts = []
    run_in_team(parts.append, num_parts)
    assert sorted(parts) == list(range(num_parts))


@pytest.mark.skipif(threads._find_openmp() is None, reason="torch computes without GCC's OpenMP")
def test_two_parts_are_computed_at_once():
    meeting = threading.Barrier(2, timeout=30)
    run_in_team(lambda _: meeting.wait(), 2)
    assert not meeting.broken


def test_an_error_in_a_part_is_raised_and_the_team_goes_on():
    def fail(part: int) -> None:
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part"):
        run_in_team(fail, 2)
    assert torch.ones(300, 300).mm(torch.ones(300, 300)).sum() == 300**3
