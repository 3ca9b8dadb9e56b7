"""Attention of single tokens on a CPU gives what torch's own attention gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llava_ray.engine.torch_engine.execution.attention_metadata import DecodeMetadata
from llava_ray.engine.torch_engine.execution.cpu_attention import (
    KernelInputs,
    attend_decode,
    attend_prompt,
    rotate_and_attend,
)
from llava_ray.engine.torch_engine.execution.cpu_layers import rotate, store_rows
from llava_ray.engine.torch_engine.execution.numba_ops import compile_cached
from tests.support.attention_reference import check_attention

CPU_ATTENTION = "llava_ray.engine.torch_engine.execution.cpu_attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("num_threads", "window"), [(1, None), (3, None), (3, 7)])
def test_each_sequence_sees_its_own_keys_and_no_others(
    dtype, num_heads, num_kv_heads, num_threads, window, monkeypatch
):
    monkeypatch.setattr(f"{CPU_ATTENTION}._MIN_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    check_attention(
        attend_decode, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("num_threads", "window"), [(1, None), (3, 7)])
def test_new_tokens_are_rotated_and_kept_and_see_what_came_before(
    dtype, cache_dtype, num_heads, num_kv_heads, num_threads, window, monkeypatch
):
    monkeypatch.setattr(f"{CPU_ATTENTION}._MIN_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    slices, lengths, size = [(40, 16), (0, 40), (60, 8)], [16, 33, 1], 16
    heads_TX = torch.randn(3, (num_heads + 2 * num_kv_heads) * size).to(dtype)
    rotations_T1C = torch.polar(torch.ones(3, 1, size // 2), 3 * torch.randn(3, 1, size // 2))
    pools = torch.randn(2, 70 * num_kv_heads, size).to(cache_dtype)
    before = pools.clone()
    numbers = torch.tensor([[0, 1, 2], *zip(*slices, strict=True), lengths])
    rows = DecodeMetadata(*numbers, num_kv_heads=num_kv_heads).find_rows(window)
    places = KernelInputs.of(rows, pools[0], num_kv_heads=num_kv_heads)
    found_TX = rotate_and_attend(
        heads_TX, rotations_T1C, *pools, places, num_kv_heads=num_kv_heads, scaling=0.3
    )
    assert found_TX.dtype == dtype
    exact = dtype == cache_dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.02, "atol": 0.02}
    heads_TJE = heads_TX.float().unflatten(-1, (-1, size))
    rotated_TJE = torch.view_as_real(
        torch.view_as_complex(heads_TJE.unflatten(-1, (-1, 2))) * rotations_T1C
    ).flatten(2)
    key_TKE = rotated_TJE[:, num_heads : num_heads + num_kv_heads]
    value_TKE = heads_TJE[:, num_heads + num_kv_heads :]
    for t, ((start, length), seen) in enumerate(zip(slices, lengths, strict=True)):
        mine = slice(start * num_kv_heads, (start + length) * num_kv_heads)
        shape = (2, num_kv_heads, length, size)
        new, old = (each[:, mine].view(shape).float() for each in (pools, before))
        kept = torch.stack([key_TKE[t], value_TKE[t]])
        torch.testing.assert_close(new[:, :, seen - 1], kept, **tolerance)
        new[:, :, seen - 1] = old[:, :, seen - 1]
        assert torch.equal(new, old), "nothing else is written"
        old[:, :, seen - 1] = kept
        key_KSE, value_KSE = old[:, :, max(0, seen - (window or seen)) : seen]
        expected_HE = F.scaled_dot_product_attention(
            rotated_TJE[t, :num_heads][None, :, None],
            key_KSE[None],
            value_KSE[None],
            scale=0.3,
            enable_gqa=True,
        )[0, :, 0]
        torch.testing.assert_close(found_TX[t].float(), expected_HE.flatten(), **tolerance)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(4, 4, 16), (6, 2, 64)])
def test_one_call_gives_exactly_what_its_steps_give_one_by_one(num_heads, num_kv_heads, size):
    """A decoding step uses the one, a step that also holds a prompt the others."""
    torch.manual_seed(0)
    num_rotated, num_tokens, length = num_heads + num_kv_heads, 7, 50
    heads_TJE = torch.randn(num_tokens, num_rotated + num_kv_heads, size).bfloat16()
    angles = 3 * torch.randn(num_tokens, 1, size // 2)
    rotations_T1C = torch.polar(torch.ones_like(angles), angles)
    pools = torch.randn(2, num_tokens * length * num_kv_heads, size).bfloat16()
    sizes = torch.full((num_tokens,), length)
    tokens = torch.arange(num_tokens)
    slices = DecodeMetadata(tokens, tokens * length, sizes, sizes, num_kv_heads=num_kv_heads)
    rows = slices.find_rows(None)
    one_call = pools.clone()
    found_TX = rotate_and_attend(
        heads_TJE.flatten(1),
        rotations_T1C,
        *one_call,
        KernelInputs.of(rows, pools[0], num_kv_heads=num_kv_heads),
        num_kv_heads=num_kv_heads,
        scaling=0.3,
    )
    rotate(heads_TJE, rotations_T1C, num_rotated)
    last_K = (torch.arange(num_kv_heads) + 1) * length - 1
    written = (tokens[:, None] * length * num_kv_heads + last_K).flatten()
    store_rows(pools[0], written, heads_TJE[:, num_heads:num_rotated])
    store_rows(pools[1], written, heads_TJE[:, num_rotated:])
    expected_THE = heads_TJE.new_empty(num_tokens, num_heads, size)
    attend_decode(
        heads_TJE[:, :num_heads],
        *pools,
        rows,
        expected_THE,
        num_kv_heads=num_kv_heads,
        scaling=0.3,
    )
    assert torch.equal(one_call, pools)
    assert torch.equal(found_TX, expected_THE.flatten(1))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_tokens_of_a_prompt_do_not_depend_on_how_it_is_divided(num_heads, num_kv_heads):
    torch.manual_seed(0)
    query_THE = torch.randn(40, num_heads, 16).bfloat16()
    key_KSE, value_KSE = torch.randn(2, num_kv_heads, 40, 16).bfloat16()

    def attend(begin: int, end: int) -> torch.Tensor:
        return attend_prompt(
            query_THE[begin:end], key_KSE[:, :end], value_KSE[:, :end], scaling=0.3, window=None
        )

    whole_THE = attend(0, 40)
    for cut in (1, 17, 39):
        assert torch.equal(torch.cat([attend(0, cut), attend(cut, 40)]), whole_THE)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("num_tokens", "past"), [(1, 0), (9, 0), (9, 30), (70, 3)])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("max_scores", [1, 1 << 20])
def test_each_token_of_a_prompt_sees_what_came_before(
    num_heads, num_kv_heads, num_tokens, past, window, max_scores, monkeypatch
):
    monkeypatch.setattr(f"{CPU_ATTENTION}._MAX_SCORES", max_scores)
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
    compile_cached(count)(numbers)
    assert numbers.tolist() == [1, 1]
