"""The upper limit of a machine's serving speed, from its FLOP/s and memory bandwidth."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmark_requests import Load, ServingFigures, make_question
from benchmark_systems import render


class Rates(NamedTuple):
    """The machine's speed.

    Attributes:
        flop_per_s: in a large matmul of the model.
        byte_per_s: bytes read from memory per second.
    """

    flop_per_s: float
    byte_per_s: float


def compute_limit(name: str, load: Load, measured: Sequence[Rates]) -> list[ServingFigures]:
    """Return what the machine could serve if it only multiplied matrices and read memory.

    Each token takes two operations for each weight of tower, projector and language model, and
    those of attention. Each step reads the weights once, in 16 bits, and the keys and values of
    each client's sequence, in the precision of the cache.

    Args:
        measured: rates measured before, between and after the compared systems. Their mean is used,
            because the machine's speed changes in the meantime.
    """
    from llava_ray.model.loading import load_model

    flop_per_s, byte_per_s = (statistics.mean(each) for each in zip(*measured, strict=True))
    core = load_model(load.model, dtype=load.name_dtype())
    text = core.model.config.text_config
    inner = core.model.model
    head = core.model.lm_head.weight.numel()
    tower, projector, language = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (inner.vision_tower, inner.multi_modal_projector, inner.language_model.layers)
    )
    questions = [make_question(s, size=load.image_size) for s in range(16)]
    encoded = [
        core.encode(render(core.template, each), [each.image])["input_ids"][0] for each in questions
    ]
    num_prompt = statistics.mean(len(ids) for ids in encoded)
    num_image = statistics.mean(int((ids == core.image_token_id).sum()) for ids in encoded)
    width, depth = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    kv_bytes = (
        2 * core.model.dtype.itemsize * depth * width * (text.num_key_value_heads or heads) // heads
    )
    prefill_flop = 2 * (num_image * (tower + projector) + num_prompt * language + head)
    prefill_flop += 2 * depth * width * num_prompt**2
    num_seen = num_prompt + load.max_tokens / 2
    decode_flop = 2 * (language + head) + 4 * depth * width * num_seen
    rows = []
    for clients in load.clients:
        computing_s = clients * (prefill_flop + load.max_tokens * decode_flop) / flop_per_s
        read = 2 * (language + head) + clients * kv_bytes * num_seen
        reading_s = load.max_tokens * read / byte_per_s
        prefill_s = clients * prefill_flop / flop_per_s
        wall_s = max(computing_s, prefill_s + reading_s)
        rate = clients * load.max_tokens / wall_s
        rows.append(
            ServingFigures(name, clients, clients, round(clients / wall_s, 2), round(rate, 1))
        )
    print(f"mean: {flop_per_s / 1e9:.0f} GFLOP/s, {byte_per_s / 1e9:.1f} GB/s", flush=True)
    return rows


def measure_rates(load: Load) -> Rates:
    """Measure the matmuls of the language model's largest layer, and reading 400 MB."""
    import torch

    from llava_ray.engine.torch_engine.execution.packed_linear import pack_linears
    from llava_ray.model.loading import load_model
    from llava_ray.model.precision import has_fast_bfloat16

    core = load_model(load.model, dtype=load.name_dtype())
    linear = core.model.model.language_model.layers[0].mlp.gate_proj
    layer, weight = torch.nn.Sequential(linear), linear.weight.detach()
    dtype = weight.dtype if has_fast_bfloat16() else torch.float32
    weight = weight.to(dtype)
    states = torch.randn(512, weight.shape[1], dtype=dtype)
    flop = 2 * len(states) * weight.numel()
    plain_s = time_median(lambda: torch.nn.functional.linear(states, weight))
    pack_linears(layer)
    with torch.inference_mode():
        packed_s = time_median(lambda: layer(states))
    numbers = torch.ones(100_000_000)
    read_s = time_median(lambda: numbers.sum())
    rates = Rates(flop / min(plain_s, packed_s), 4 * len(numbers) / read_s)
    print(f"{rates.flop_per_s / 1e9:.0f} GFLOP/s, {rates.byte_per_s / 1e9:.1f} GB/s", flush=True)
    return rates


def time_median(run: Callable[[], Any], *, for_s: float = 2) -> float:
    """Return the median time of the calls that fit into `for_s` seconds."""
    run()  # warms up
    end, times_s = time.perf_counter() + for_s, []
    while (start := time.perf_counter()) < end:
        run()
        times_s.append(time.perf_counter() - start)
    return statistics.median(times_s)
