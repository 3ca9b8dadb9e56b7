"""Names of tensors: every stored name maps to a name in memory, and back to the same name."""

import pytest

from llava_ray.model.checkpoint.tensor_names import (
    count_projector_layers,
    detect_format,
    from_memory,
    to_memory,
    tower_to_memory,
)

PUBLISHED = {
    "vision_tower.vision_model.embeddings.class_embedding": (
        "model.vision_tower.embeddings.class_embedding"
    ),
    "multi_modal_projector.linear_2.bias": "model.multi_modal_projector.linear_2.bias",
    "language_model.model.layers.0.self_attn.q_proj.weight": (
        "model.language_model.layers.0.self_attn.q_proj.weight"
    ),
    "language_model.lm_head.weight": "lm_head.weight",
    "image_newline": "model.image_newline",
}
ORIGINAL = {
    "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias": (
        "model.vision_tower.encoder.layers.1.mlp.fc1.bias"
    ),
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.4.bias": "model.multi_modal_projector.linear_3.bias",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.image_newline": "model.image_newline",
}


@pytest.mark.parametrize(("stored", "memory"), PUBLISHED.items())
def test_published_names_go_there_and_back(stored, memory):
    assert to_memory(stored, "hf") == memory
    assert from_memory(memory, "hf") == stored


@pytest.mark.parametrize(("stored", "memory"), ORIGINAL.items())
def test_original_names_go_there_and_back(stored, memory):
    assert to_memory(stored, "llava") == memory
    assert from_memory(memory, "llava") == stored


def test_a_linear_projector_has_no_number_in_the_original_layout():
    memory = "model.multi_modal_projector.linear_1.weight"
    assert to_memory("model.mm_projector.weight", "llava") == memory
    assert from_memory(memory, "llava", projector="linear") == "model.mm_projector.weight"


def test_mpt_calls_its_trunk_transformer():
    for stored, memory in {
        "transformer.blocks.0.attn.Wqkv.weight": "model.language_model.blocks.0.attn.Wqkv.weight",
        "transformer.wte.weight": "model.language_model.wte.weight",
        "transformer.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    }.items():
        assert to_memory(stored, "llava") == memory
        assert from_memory(memory, "llava", text_model_type="mpt") == stored


@pytest.mark.parametrize("memory", PUBLISHED.values())
def test_what_transformers_saves_today_is_read_too(memory):
    assert to_memory(memory, "hf") == memory


def test_buffers_that_old_files_hold_have_no_place():
    assert to_memory("model.layers.0.self_attn.rotary_emb.inv_freq", "llava") is None
    assert to_memory("vision_tower.vision_model.embeddings.position_ids", "hf") is None


def test_the_text_half_of_a_clip_has_no_place():
    assert tower_to_memory("text_model.final_layer_norm.bias") is None
    assert tower_to_memory("logit_scale") is None
    assert tower_to_memory("vision_model.post_layernorm.bias") == (
        "model.vision_tower.post_layernorm.bias"
    )


def test_the_layout_is_told_from_the_names():
    assert detect_format(PUBLISHED) == "hf"
    assert detect_format(PUBLISHED.values()) == "hf"
    assert detect_format(ORIGINAL) == "llava"
    assert detect_format(["transformer.wte.weight"]) == "llava"


def test_a_projector_has_as_many_layers_as_its_type_says():
    assert count_projector_layers("linear") == count_projector_layers("mlp1x_gelu") == 1
    assert count_projector_layers("mlp3x_gelu") == 3
    assert count_projector_layers("identity") == 0
    with pytest.raises(ValueError, match="unknown projector type 'spatial'"):
        count_projector_layers("spatial")
