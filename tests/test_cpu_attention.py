"""Attention of single tokens on a CPU gives what torch's own attention gives."""

import numpy as np
import pytest
import torch
from attention import check_attention

from llava_ray.engine.compiled import compile_kept
from llava_ray.engine.cpu_attention import attend_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("num_threads", "window"), [(1, None), (3, None), (3, 7)])
def test_each_sequence_sees_its_own_keys_and_no_others(
    dtype, num_heads, num_kv_heads, num_threads, window, monkeypatch
):
    monkeypatch.setattr("llava_ray.engine.cpu_attention._MIN_READ", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    check_attention(
        attend_rows, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window
    )


def test_where_nothing_can_be_written_it_is_compiled_for_the_process(monkeypatch):
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    def count(numbers):
        for i in range(len(numbers)):
            numbers[i] += 1

    numbers = np.zeros(2)
    compile_kept(count)(numbers)
    assert numbers.tolist() == [1, 1]
