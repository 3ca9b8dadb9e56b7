"""Builds small LLaVA checkpoints with random weights and a byte tokenizer; nothing is downloaded.

For tests (`TINY`) and speed measurements (`SHAPE_103M`). What such a model says is noise; loading,
encoding and computing are as in a real one.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ray.model.transformers_output import no_progress_bars

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA: a CLIP tower, a two-layer projector, a Llama.

    Attributes:
        spread: standard deviation of the random weights.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_size: int
    vision_hidden_size: int
    vision_num_layers: int
    vision_num_heads: int
    image_size: int
    patch_size: int
    context_length: int
    spread: float = 0.02

    @property
    def num_image_tokens(self) -> int:
        """The number of tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


TINY = Shape(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=128,
    vision_hidden_size=32,
    vision_num_layers=2,
    vision_num_heads=2,
    image_size=32,
    patch_size=8,
    context_length=512,
    spread=0.2,
)
"""For tests: loads and answers in milliseconds; 16 tokens per image, grouped-query attention."""

SHAPE_103M = Shape(
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    mlp_size=2048,
    vision_hidden_size=384,
    vision_num_layers=8,
    vision_num_heads=6,
    image_size=224,
    patch_size=16,
    context_length=1024,
)
"""For speed measurements: about 103 million weights, 196 tokens for each image."""


def build_random_model(
    folder: str | Path,
    shape: Shape = TINY,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a LLaVA with random weights that `load_model` can load; return its folder.

    The same arguments always write the same weights.
    """
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_byte_tokenizer(context_length=shape.context_length)
    text_config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=shape.spread,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=4 * shape.vision_hidden_size,
        num_hidden_layers=shape.vision_num_layers,
        num_attention_heads=shape.vision_num_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    config = LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=shape.num_image_tokens,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": shape.image_size},
            crop_size={"height": shape.image_size, "width": shape.image_size},
        ),
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config)
    model = model.to(dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with no_progress_bars():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def build_byte_tokenizer(*, context_length: int) -> Any:
    """Return a byte-level tokenizer: all bytes, pairs of letters, `<image>`, `<s>`, `</s>`.

    It encodes any text without loss, and a character may take several tokens, as in real ones.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    firsts = ["Ġ", *string.ascii_lowercase]  # Ġ is how byte-level BPE writes a space
    merges = [(a, b) for a in firsts for b in string.ascii_lowercase]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in [*SPECIAL_TOKENS.values(), "<image>"]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
