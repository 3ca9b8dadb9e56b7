"""Attention of single tokens on a CPU gives what torch's own attention gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava_ray.engine.compiled import compile_kept
from llava_ray.engine.cpu_attention import Rows, attend_rows

HEAD_SIZE = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_each_sequence_sees_its_own_keys_and_no_others(
    dtype, num_heads, num_kv_heads, num_threads, monkeypatch
):
    monkeypatch.setattr("llava_ray.engine.cpu_attention._MIN_READ", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    regions = [(40, 16), (0, 40), (60, 8)]  # of the cache: where each begins, and its places
    lengths = [16, 33, 1]
    keys, values = torch.randn(2, 70 * num_kv_heads, HEAD_SIZE).to(dtype)
    query_THE = 3 * torch.randn(5, 2 * num_heads, HEAD_SIZE)[:, :num_heads]  # part of wider rows
    output_THE = torch.full((5, num_heads, HEAD_SIZE), 7.0)
    tokens = [3, 0, 4]  # the others belong to prompts
    starts, sizes = np.array(regions).T
    attend_rows(
        query_THE,
        keys,
        values,
        Rows(np.array(tokens), starts * num_kv_heads, sizes.copy(), np.array(lengths)),
        output_THE,
        num_kv_heads=num_kv_heads,
        scaling=0.3,
    )
    assert (output_THE[1:3] == 7).all()
    for token, (start, size), length in zip(tokens, regions, lengths, strict=True):
        mine = slice(start * num_kv_heads, (start + size) * num_kv_heads)
        key_KSE, value_KSE = (
            pool[mine].view(num_kv_heads, size, HEAD_SIZE)[:, :length].float()
            for pool in (keys, values)
        )
        expected_HE = F.scaled_dot_product_attention(
            query_THE[token][None, :, None],
            key_KSE[None],
            value_KSE[None],
            scale=0.3,
            enable_gqa=True,
        )[0, :, 0]
        torch.testing.assert_close(output_THE[token], expected_HE, rtol=1e-5, atol=1e-5)


def test_where_nothing_can_be_written_it_is_compiled_for_the_process(monkeypatch):
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    def count(numbers):
        for i in range(len(numbers)):
            numbers[i] += 1

    numbers = np.zeros(2)
    compile_kept(count)(numbers)
    assert numbers.tolist() == [1, 1]
