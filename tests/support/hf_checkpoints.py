"""Writers of tiny checkpoints in Hugging Face's format: LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from llava_ray.model.build.random_model import build_byte_tokenizer
from tests.support.llava_checkpoints import MEAN, STD

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
GRID = [[28, 56], [56, 28], [56, 56], [28, 84]]


def write_published(folder: Path, kind: str) -> tuple[Path, Any]:
    """Write a folder as transformers does; return it and the model."""
    tokenizer = build_byte_tokenizer(context_length=512)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    pixels: dict[str, Any] = {"image_mean": MEAN, "image_std": STD}
    text: dict[str, Any] = {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": 0}
    config: Any
    if kind == "llava_onevision":
        config = LlavaOnevisionConfig(
            text_config=Qwen2Config(**text, tie_word_embeddings=True),
            vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
            image_token_index=image_id,
            video_token_index=len(tokenizer),
            image_grid_pinpoints=GRID,
            vision_aspect_ratio="anyres_max_2",
        )
        size = {"height": 28, "width": 28}
        images: Any = LlavaOnevisionImageProcessorPil(
            size=size, image_grid_pinpoints=GRID, **pixels
        )
    else:
        vision = CLIPVisionConfig(**TOWER)
        clip = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **pixels}
        common = {
            "text_config": MistralConfig(**text),
            "vision_config": vision,
            "image_token_index": image_id,
            "image_seq_length": 16,
        }
        if kind == "llava_next":
            config = LlavaNextConfig(**common, image_grid_pinpoints=GRID)
            images = LlavaNextImageProcessorPil(image_grid_pinpoints=GRID, **clip)
        else:
            config, images = LlavaConfig(**common), CLIPImageProcessorPil(**clip)
    classes: dict[str, Any] = {
        "llava": LlavaForConditionalGeneration,
        "llava_next": LlavaNextForConditionalGeneration,
        "llava_onevision": LlavaOnevisionForConditionalGeneration,
    }
    torch.manual_seed(0)
    model = classes[kind](config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    settings = {"patch_size": 7, "num_additional_image_tokens": int(kind != "llava_onevision")}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder, model
