"""The part of a step that CUDA graphs record, run on tensors without memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModel,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_ray.engine.torch_engine.execution.attention import (
    ATTENTION_NAME,
    Span,
    _describe,
    attend,
)
from llava_ray.engine.torch_engine.execution.cuda_graphs import DecodeGraphs
from llava_ray.engine.torch_engine.execution.fused_decoder import FusedDecoder, can_fuse, fuse
from llava_ray.engine.torch_engine.execution.kv_cache import KVCache
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}
META = torch.device("meta")


def make_graphs(config, *, compute=None) -> DecodeGraphs:
    with META:
        model = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=torch.bfloat16)
    AttentionInterface.register(ATTENTION_NAME, attend)
    model.set_attn_implementation(ATTENTION_NAME)
    cache = KVCache(
        num_tokens=67,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        dtype=torch.bfloat16,
        device=META,
    )
    layers = None
    if can_fuse(model):
        fuse(model)
        layers = FusedDecoder(model)

    def compute_logits(ids_B, metadata):
        embeddings_BD = model.get_input_embeddings()(ids_B)
        if layers:
            return head(layers(embeddings_BD, metadata))
        hidden = model(
            inputs_embeds=embeddings_BD[None],
            position_ids=metadata.positions_T[None],
            use_cache=False,
            metadata=metadata,
        )
        return head(hidden.last_hidden_state[0])

    return DecodeGraphs(compute or compute_logits, cache, KVSlice(64, 3), max_batch_size=5)


@pytest.mark.parametrize(
    "make", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig]
)
def test_a_step_reads_no_number_from_the_gpu_and_no_tensor_of_the_cpu(make):
    assert make_graphs(make(**SIZES)).find_obstacle() is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotations_that_depend_on_the_longest_position_are_named_before_a_graph_is_tried(rope):
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    obstacle = make_graphs(config).record()
    assert obstacle
    assert "modeling_rope_utils.py" in obstacle


def test_a_step_that_copies_from_the_cpu_is_named():
    def compute(ids_B, metadata):
        return ids_B + torch.tensor([1]).to(META)

    obstacle = make_graphs(LlamaConfig(**SIZES), compute=compute).find_obstacle()
    assert obstacle
    assert "test_cuda_graphs.py" in obstacle
    assert "cpu" in obstacle


def test_rows_of_the_table_begin_where_compiled_kernels_expect_them():
    """At multiples of 16 bytes, for every batch size: Triton compiles again for other pointers."""
    cache = SimpleNamespace(device=torch.device("cpu"), num_kv_heads=32)
    for batch in range(1, 9):
        spans = [Span(i, 1, KVSlice(64 * i, 64), 10 + i) for i in range(batch)]
        rows = _describe(spans, cache).find_rows(None)  # pyright: ignore[reportArgumentType]
        assert [row.data_ptr() % 16 for row in rows] == [0, 0, 0, 0]
        assert rows.lengths.tolist() == [11 + i for i in range(batch)]
