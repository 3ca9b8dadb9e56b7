"""Loads a checkpoint and turns text and pictures into the inputs of its model.

Below everything that computes: engines, training and evaluation all get their model from
`load_model`, so that what a folder holds is decided here and only here, by what its files say.

Shapes: B samples, T tokens, N images, C H W pixels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_ray.errors import ConfigError, MissingPackageError, RequestError
from llava_ray.model.folder import (
    find_folder,
    read_config,
    read_processor_settings,
    require_files,
)
from llava_ray.template import VICUNA, Template

if TYPE_CHECKING:
    from PIL import Image as PILImage

DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Core:
    """A loaded multimodal model and what is needed to speak with it.

    Attributes:
        model: transformers' module, on its device, in evaluation mode.
        processor: transformers' processor: the tokenizer and the picture's preprocessing.
        tokenizer: the processor's tokenizer.
        template: renders conversations into prompts.
        context_length: the longest prompt plus answer, in tokens.
        image_token_id: the id that stands for one patch of a picture.
        eos_token_ids: generation ends at any of these.
    """

    model: Any
    processor: Any
    tokenizer: Any
    template: Template
    context_length: int
    image_token_id: int
    eos_token_ids: frozenset[int]

    def encode(self, text: str, images: Sequence["PILImage.Image"] = ()) -> dict[str, torch.Tensor]:
        """Return the model's inputs for one prompt, on the CPU.

        Args:
            text: the prompt, with one `<image>` for each picture, in order.
            images: the pictures, RGB.

        Returns:
            `input_ids` and `attention_mask` [1, T], each `<image>` expanded to as many ids as the
            picture has tokens, and with pictures `pixel_values` [N, C, H, W] in float32.

        Raises:
            RequestError: the number of pictures is not the number of `<image>` in the text.
        """
        token = self.template.image_token
        if text.count(token) != len(images):
            raise RequestError(
                f"the prompt names {text.count(token)} pictures and {len(images)} came with it: "
                f"write {token} once for each picture",
                param="messages",
            )
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=text,
            images=list(images) or None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_tensors="pt",
        )
        return dict(inputs)


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attention: str = "sdpa",
) -> Core:
    """Load the LLaVA checkpoint in a folder.

    Args:
        path: a folder in transformers' format, or "demo" for the embedded model.
        dtype: precision of the weights in memory; "auto" is bfloat16.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        attention: transformers' name of the attention implementation.

    Raises:
        ConfigError: the folder is missing, is no checkpoint of a known kind, or lacks files.
    """
    folder = find_folder(path)
    config = read_config(folder)
    require_files(folder)
    target = select_device(device)
    processor = _load_processor(folder, config)
    model = _load_weights(folder, dtype=select_dtype(dtype), device=target, attention=attention)
    tokenizer = processor.tokenizer
    return Core(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        template=_build_template(processor),
        context_length=model.config.text_config.max_position_embeddings,
        image_token_id=model.config.image_token_id,
        eos_token_ids=_find_eos(model, tokenizer),
    )


def select_device(name: str) -> torch.device:
    """Return the torch device that `name` ("auto", "cpu", "cuda:1", ...) stands for.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device: use auto, cpu or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    return device


def select_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the precision that a name of the configuration stands for.

    Raises:
        ConfigError: no such precision.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load_processor(folder: Path, config: dict[str, Any]) -> Any:
    """Put the processor together from its parts.

    `AutoProcessor` would look for torchvision and say at length that it is not there; the parts
    can be asked for the PIL implementation, which needs nothing and gives the original's pixels.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except ImportError as error:
        raise MissingPackageError(
            f"the tokenizer of {str(folder)!r} needs another package: {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer or preprocessor in {str(folder)!r} does not load: {error}"
        ) from error
    settings = read_processor_settings(folder)
    vision = config.get("vision_config", {})
    has_cls = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=settings.get("patch_size") or vision.get("patch_size", 14),
        vision_feature_select_strategy=config.get("vision_feature_select_strategy", "default"),
        num_additional_image_tokens=settings.get("num_additional_image_tokens", int(has_cls)),
        image_token=settings.get("image_token", "<image>"),
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )


def _load_weights(folder: Path, *, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    from safetensors import SafetensorError
    from transformers import LlavaForConditionalGeneration

    try:
        with no_progress_bars():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=attention,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"the weights in {str(folder)!r} do not load: {error}; fetch them again"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"the weights in {str(folder)!r} lack {len(missing)} tensors "
            f"({', '.join(missing[:3])}): the files do not belong to this config.json"
        )
    return model.eval()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal for as long as this lasts."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _build_template(processor: Any) -> Template:
    tokenizer = processor.tokenizer
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return Template(
        source=processor.chat_template or VICUNA,
        image_token=processor.image_token,
        special_tokens=tuple(dict.fromkeys([processor.image_token, *tokenizer.all_special_tokens])),
        variables=tuple((name, getattr(tokenizer, name) or "") for name in names),
    )


def _find_eos(model: Any, tokenizer: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
