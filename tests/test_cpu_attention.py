"""Attention of single tokens on a CPU gives what torch's own attention gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention import check_attention

from llava_ray.engine.compiled import compile_kept
from llava_ray.engine.cpu_attention import attend_prompt, attend_rows


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


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("num_tokens", "past"), [(1, 0), (9, 0), (9, 30), (70, 3)])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("max_scores", [1, 1 << 20])
def test_each_token_of_a_prompt_sees_what_came_before(
    num_heads, num_kv_heads, num_tokens, past, window, max_scores, monkeypatch
):
    monkeypatch.setattr("llava_ray.engine.cpu_attention._MAX_SCORES", max_scores)
    torch.manual_seed(0)
    size = num_tokens + past
    heads_TJE = torch.randn(num_tokens, 2 * num_heads, 16).bfloat16()
    key_KSE, value_KSE = torch.randn(2, num_kv_heads, size + 5, 16).bfloat16()[:, :, :size]
    query_THE = heads_TJE[:, :num_heads]
    is_seen_TS = torch.ones(num_tokens, size, dtype=torch.bool).tril(past)
    expected_HTE = F.scaled_dot_product_attention(
        query_THE.transpose(0, 1).float()[None],
        key_KSE.float()[None],
        value_KSE.float()[None],
        attn_mask=is_seen_TS.triu(past + 1 - window) if window else is_seen_TS,
        enable_gqa=True,
        scale=0.3,
    )[0]
    found_THE = attend_prompt(query_THE, key_KSE, value_KSE, scaling=0.3, window=window)
    assert found_THE.dtype == torch.bfloat16
    torch.testing.assert_close(
        found_THE.transpose(0, 1).float(), expected_HTE, rtol=0.02, atol=0.02
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
