"""Builds a new LLaVA from a language model and a vision tower, joined by a new projector.

Behind `llava-ray build`, the start of a training run. The result is a folder in transformers'
format. It answers text as the language model does, and its projector is untrained.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llava_ray.errors import ConfigError
from llava_ray.model.build.backbones import (
    KINDS,
    LanguageModel,
    VisionTower,
    add_image_token,
    load_language_model,
    load_tower,
)
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.model.checkpoint.tensor_names import count_projector_layers
from llava_ray.model.export.atomic_folder import MAX_SHARD_SIZE, write_folder
from llava_ray.model.export.chat_template import choose_chat
from llava_ray.model.export.hf_writer import write_hf
from llava_ray.model.modeling import Projector
from llava_ray.model.processor import read_preprocessing
from llava_ray.model.transformers_output import no_warnings
from llava_ray.template import IMAGE_TOKEN

ImageAspect = Literal["square", "pad", "anyres"]
SelectFeature = Literal["patch", "cls_patch"]

GRID = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The grids, in tiles high and wide, that anyres may lay an image out on (LLaVA-NeXT)."""


def build_llava(
    out: str | Path,
    *,
    llm: str | Path,
    vision_tower: str | Path,
    projector: str = "mlp2x_gelu",
    image_aspect: ImageAspect = "square",
    select_layer: int = -2,
    select_feature: SelectFeature = "patch",
    template: str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a LLaVA made of a language model, a tower and a new projector; return its folder.

    The dtype is the language model's. The same arguments always write the same weights. If the
    embeddings have no free row for `<image>`, rows are added, each the mean of the others.

    Args:
        out: the folder to write.
        llm: folder or hub name of a causal language model that transformers knows.
        vision_tower: folder or hub name of a CLIP or SigLIP model.
        projector: "mlp2x_gelu", "linear" or "identity", as LLaVA names them.
        image_aspect: how an image is fitted to the tower's square input: "square" crops it (or
            squeezes it, as the tower's preprocessing says), "pad" adds borders, "anyres" also lays
            it out in tiles.
        select_layer: the hidden states of the tower that are its features; -2: the last but one.
        select_feature: "patch" drops the class token, "cls_patch" keeps it.
        template: name of a conversation template; by default the language model's own, or one that
            suits it.
        max_shard_size: maximum size of a weight file.
        seed: seed of the new weights.
        overwrite: replace the checkpoint in `out`.

    Raises:
        ConfigError: a model cannot be used, or the two do not fit together.
    """
    sources = [find_folder(llm), find_folder(vision_tower)]
    _check_projector(projector)
    with write_folder(out, overwrite=overwrite, sources=sources) as scratch, no_warnings():
        language = load_language_model(llm)
        source, name = choose_chat(language.tokenizer, language.model.config.model_type, template)
        language = add_image_token(language)
        tower = load_tower(vision_tower, dtype=language.model.dtype)
        config = _describe(language, tower, projector, image_aspect, select_layer, select_feature)
        model = _join(language, tower, config, seed=seed)
        _check_text(language, model)
        processor = _build_processor(language.tokenizer, tower, config, image_aspect)
        processor.chat_template = source
        fields = {"llava_ray_template": name} if name else {}
        write_hf(scratch, model, processor, max_shard_size=max_shard_size, fields=fields)
    return Path(out)


def _check_projector(projector: str) -> None:
    try:
        is_known = count_projector_layers(projector) <= 2
    except ValueError:
        is_known = False
    if not is_known:
        raise ConfigError(
            f"projector={projector!r}: transformers' LLaVA projector has at most two layers; "
            "use mlp2x_gelu, linear or identity"
        )


def _describe(
    language: LanguageModel,
    tower: VisionTower,
    projector: str,
    image_aspect: ImageAspect,
    select_layer: int,
    select_feature: SelectFeature,
) -> Any:
    """Return transformers' configuration of the LLaVA."""
    from transformers import LlavaConfig, LlavaNextConfig

    vision = copy.deepcopy(tower.model.config)
    text = copy.deepcopy(language.model.config)
    num_layers = vision.num_hidden_layers
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ConfigError(
            f"select_layer={select_layer}: the tower has {num_layers} layers, so its hidden states "
            f"are numbered {-num_layers - 1} to {num_layers}"
        )
    if projector == "identity" and vision.hidden_size != text.hidden_size:
        raise ConfigError(
            f"projector='identity': the tower's features have size {vision.hidden_size} and the "
            f"language model's embeddings {text.hidden_size}; use mlp2x_gelu"
        )
    keeps_cls = tower.has_cls and select_feature == "cls_patch"
    settings: dict[str, Any] = {"mm_projector_type": projector}
    if image_aspect == "anyres":
        if keeps_cls:
            raise ConfigError(
                "select_feature='cls_patch': class tokens cannot be laid out on the grid of "
                "anyres; use patch"
            )
        size = vision.image_size
        settings["image_grid_pinpoints"] = [[high * size, wide * size] for high, wide in GRID]
    config_class = LlavaNextConfig if image_aspect == "anyres" else LlavaConfig
    return config_class(
        text_config=text,
        vision_config=vision,
        image_token_index=language.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + keeps_cls,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy="default" if tower.has_cls and not keeps_cls else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        **settings,
    )


def _join(language: LanguageModel, tower: VisionTower, config: Any, *, seed: int) -> Any:
    """Return transformers' model around the two models, whose weights are not copied."""
    from transformers import AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise _refuse(config.text_config.model_type, str(error)) from error
    model.model.language_model = language.model.base_model
    model.model.vision_tower = tower.model
    model.lm_head = language.model.get_output_embeddings()
    in_size, out_size = config.vision_config.hidden_size, config.text_config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(in_size, out_size, count_projector_layers(config.mm_projector_type))
        model.model.multi_modal_projector = projector.to(language.model.dtype)
        if config.model_type == "llava_next":
            newline = torch.randn(out_size) / out_size**0.5
            model.model.image_newline = nn.Parameter(newline.to(language.model.dtype))
    model.generation_config = _plain_generation(language)
    return model.eval()


def _plain_generation(language: LanguageModel) -> Any:
    """Return a generation config with special tokens only; sampling is up to each request."""
    from transformers import GenerationConfig

    theirs, tokenizer = language.model.generation_config, language.tokenizer
    return GenerationConfig(
        bos_token_id=theirs.bos_token_id if theirs else tokenizer.bos_token_id,
        eos_token_id=(theirs.eos_token_id if theirs else None) or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.inference_mode()
def _check_text(language: LanguageModel, model: Any) -> None:
    """Raise if the LLaVA does not continue text exactly as the language model does.

    Some language models change their logits after the head (Gemma 2 bounds them, Granite and Cohere
    scale them), which transformers' LLaVA does not do.
    """
    text = language.model.config
    ids = torch.arange(min(8, text.vocab_size))[None]
    try:
        embeds = language.model.get_input_embeddings()(ids)
        states = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        logits = model.lm_head(states)
        expected = language.model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _refuse(text.model_type, str(error)) from error
    is_bounded = getattr(
        text, "final_logit_softcapping", None
    )  # bounding hardly changes small logits
    if is_bounded or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise _refuse(text.model_type, "it changes its logits after the output head")


def _refuse(kind: str, reason: str) -> ConfigError:
    return ConfigError(
        f"transformers' LLaVA does not support a language model with model_type {kind!r} "
        f"({reason}): use one of {KINDS}"
    )


def _build_processor(
    tokenizer: Any, tower: VisionTower, config: Any, image_aspect: ImageAspect
) -> Any:
    from transformers import LlavaNextProcessor, LlavaProcessor

    processor_class = LlavaNextProcessor if image_aspect == "anyres" else LlavaProcessor
    return processor_class(
        image_processor=read_preprocessing(
            tower.folder,
            pad=image_aspect == "pad",
            pinpoints=getattr(config, "image_grid_pinpoints", None),
        ),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.has_cls),
        image_token=IMAGE_TOKEN,
    )
