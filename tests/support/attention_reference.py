"""The reference for kernels that compute attention of single tokens: torch's own attention."""

import torch
import torch.nn.functional as F

from llava_ray.engine.torch_engine.execution.attention_metadata import DecodeMetadata

HEAD_SIZE = 24


def check_attention(
    attend_decode,
    *,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    window: int | None = None,
    device: str = "cpu",
    tolerance: float = 1e-5,
) -> None:
    """Compare a kernel with torch on three sequences of a step with five tokens."""
    torch.manual_seed(0)
    slices = [(40, 16), (0, 40), (60, 8)]  # of the cache: first slot and length
    lengths = [16, 33, 1]
    pools = torch.randn(2, 70 * num_kv_heads, HEAD_SIZE).to(device, dtype)
    wider = 3 * torch.randn(5, 2 * num_heads, HEAD_SIZE)
    query_THE = wider.to(device)[:, :num_heads]
    output_THE = torch.full((5, num_heads, HEAD_SIZE), 7.0, device=device)
    tokens = [3, 0, 4]  # the others belong to prompts
    starts, sizes = zip(*slices, strict=True)
    numbers = torch.tensor([tokens, starts, sizes, lengths], device=device)
    attend_decode(
        query_THE,
        *pools,
        DecodeMetadata(*numbers, num_kv_heads=num_kv_heads).find_rows(window),
        output_THE,
        num_kv_heads=num_kv_heads,
        scaling=0.3,
    )
    assert (output_THE[1:3] == 7).all()
    for token, (start, size), length in zip(tokens, slices, lengths, strict=True):
        mine = slice(start * num_kv_heads, (start + size) * num_kv_heads)
        seen = slice(max(0, length - (window or length)), length)
        key_KSE, value_KSE = (
            pool[mine].view(num_kv_heads, size, HEAD_SIZE)[:, seen].float() for pool in pools
        )
        expected_HE = F.scaled_dot_product_attention(
            query_THE[token][None, :, None],
            key_KSE[None],
            value_KSE[None],
            scale=0.3,
            enable_gqa=True,
        )[0, :, 0]
        torch.testing.assert_close(output_THE[token], expected_HE, rtol=tolerance, atol=tolerance)
