"""Loads a checkpoint's processor: its tokenizer and image preprocessing.

These are transformers' processors in their PIL implementation, which needs no torchvision and gives
the pixels of LLaVA's own code. For LLaVA's format they are configured from its config.json.

Shapes: T tokens, N images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.locate import read_json, read_processor_settings
from llava_ray.model.llama_tokenizer import run_as_llava
from llava_ray.template import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
from llava_ray.template import IMAGE_TOKEN
from llava_ray.template import tokenize_pieces as tokenize_pieces

if TYPE_CHECKING:
    from PIL import Image as PILImage

START_END = ("<im_start>", "<im_end>")
PATCH = "<im_patch>"
IMAGE_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)


def load_processor(
    checkpoint: Checkpoint, *, pinpoints: list[list[int]] | None = None, config: Any = None
) -> Any:
    """Return transformers' processor for a checkpoint.

    Args:
        checkpoint: the inspected checkpoint.
        pinpoints: the sizes for anyres, for LLaVA's format.
        config: transformers' configuration, for transformers' format.

    Raises:
        ConfigError: a file does not load, or the tokenizer does not fit the model.
        MissingPackageError: the tokenizer needs a package.
    """
    try:
        if checkpoint.format == "hf":
            return _load_hf_processor(checkpoint, config)
        return _load_llava_processor(checkpoint, pinpoints)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"the processor of {str(checkpoint.folder)!r} cannot be built "
            f"({type(error).__name__}: {error}): copy tokenizer_config.json and "
            "processor_config.json again from where the checkpoint came from"
        ) from error


def mark_images(text: str) -> str:
    """Enclose each `<image>` in `<im_start>` and `<im_end>`, unless it is already."""
    start, end = START_END
    marked = start + IMAGE_TOKEN + end
    return text.replace(marked, IMAGE_TOKEN).replace(IMAGE_TOKEN, marked)


def tiles_only_one(processor: Any) -> bool:
    """Return whether an image is laid out in tiles only if it is its prompt's only one.

    LLaVA-OneVision was trained so: each of several images takes one tile. Its processor and model
    tell by `batch_num_images`, the number of images in each prompt.
    """
    return "batch_num_images" in getattr(processor.image_processor, "model_input_names", ())


def arrange_images(processor: Any, images: Sequence["PILImage.Image"]) -> list[Any]:
    """Return the images of one prompt as its processor takes them."""
    return [list(images)] if tiles_only_one(processor) else list(images)


def encode_images(processor: Any, images: Sequence["PILImage.Image"]) -> dict[str, torch.Tensor]:
    """Return the model's inputs for the images of one prompt or sample; pixels in float32."""
    inputs = dict(processor.image_processor(arrange_images(processor, images), return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].float()
    return inputs


def _load_hf_processor(checkpoint: Checkpoint, model_config: Any) -> Any:
    from transformers import AutoImageProcessor, LlavaNextProcessor, LlavaProcessor

    folder, config = checkpoint.folder, checkpoint.config
    if checkpoint.kind == "adapter":
        folder = checkpoint.weights[0].files[0].parent
    tokenizer = load_tokenizer(checkpoint, model_config)
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"the image preprocessing in {str(folder)!r} does not load: {error}"
        ) from error
    settings = read_processor_settings(folder)
    vision = model_config.vision_config
    image_token = settings.get("image_token") or IMAGE_TOKEN
    common = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "image_token": image_token,
        "vision_feature_select_strategy": config.get(
            "vision_feature_select_strategy",
            "full" if checkpoint.model_type == "llava_onevision" else "default",
        ),
        "chat_template": settings.get("chat_template") or tokenizer.chat_template,
    }
    _check_image_token(checkpoint, tokenizer, image_token)
    if checkpoint.model_type == "llava_onevision":
        side = vision.image_size // vision.patch_size
        return _onevision_processor(
            **common,
            num_image_tokens=_read_number(settings, "num_image_tokens", folder, default=side**2),
            vision_aspect_ratio=model_config.vision_aspect_ratio,
        )
    processor = LlavaProcessor if checkpoint.model_type == "llava" else LlavaNextProcessor
    return processor(
        **common,
        patch_size=_read_number(settings, "patch_size", folder, default=vision.patch_size),
        num_additional_image_tokens=_read_number(
            settings,
            "num_additional_image_tokens",
            folder,
            default=int(vision.model_type == "clip_vision_model"),
            least=0,
        ),
    )


def _read_number(
    settings: dict[str, Any], name: str, folder: Path, *, default: int, least: int = 1
) -> int:
    """Return a number of processor_config.json; what is missing or null has the tower's value."""
    found = settings.get(name)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ConfigError(
            f"{folder / 'processor_config.json'}: {name}={found!r} is not a number of at least "
            f"{least}: remove it, and the vision tower's {default} is used"
        )
    return found


def _onevision_processor(**settings: Any) -> Any:
    """Return LLaVA-OneVision's processor for images only: videos would need torchvision."""
    from transformers import LlavaOnevisionProcessor
    from transformers.processing_utils import ProcessorMixin

    class ImageProcessor(LlavaOnevisionProcessor):
        def __init__(
            self, image_processor: Any, tokenizer: Any, chat_template: Any, **kwargs: Any
        ) -> None:
            self.num_image_tokens = kwargs["num_image_tokens"]
            self.vision_feature_select_strategy = kwargs["vision_feature_select_strategy"]
            self.vision_aspect_ratio = kwargs["vision_aspect_ratio"]
            self.image_token, self.video_token = kwargs["image_token"], "<video>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImageProcessor(**settings)


def _load_llava_processor(checkpoint: Checkpoint, pinpoints: list[list[int]] | None) -> Any:
    from transformers import LlavaNextProcessor, LlavaProcessor

    assert checkpoint.tower_folder is not None
    tokenizer = load_llava_tokenizer(checkpoint)
    is_siglip = _is_siglip(checkpoint.tower_folder)
    processor = LlavaNextProcessor if pinpoints else LlavaProcessor
    keeps_cls = checkpoint.config.get("mm_vision_select_feature") == "cls_patch" or is_siglip
    return processor(
        image_processor=read_preprocessing(
            checkpoint.tower_folder, pad=checkpoint.aspect_mode == "pad", pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=_read_patch_size(checkpoint.tower_folder),
        vision_feature_select_strategy="full" if keeps_cls else "default",
        num_additional_image_tokens=int(not is_siglip),
        image_token=IMAGE_TOKEN,
        chat_template=read_processor_settings(checkpoint.tokenizer_folder).get("chat_template")
        or tokenizer.chat_template,
    )


def read_preprocessing(
    tower: Path, *, pad: bool = False, pinpoints: list[list[int]] | None = None
) -> Any:
    """Return the image processor that a vision tower's preprocessor_config.json describes.

    Args:
        tower: the tower's folder.
        pad: add borders to make an image square.
        pinpoints: the sizes for anyres.

    Raises:
        ConfigError: transformers does not accept its settings.
    """
    from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil

    found = read_json(tower / "preprocessor_config.json")
    settings = {name: found[name] for name in IMAGE_SETTINGS if name in found}
    for name in ("size", "crop_size"):  # old files have a single number
        if isinstance(settings.get(name), int):
            side = settings[name]
            is_edge = name == "size" and settings.get("do_center_crop", True)
            settings[name] = {"shortest_edge": side} if is_edge else {"height": side, "width": side}
    if _is_siglip(tower):
        settings = {"do_center_crop": False, **settings}
    try:
        if pinpoints:
            # transformers' name for the size of a tile
            settings.setdefault("crop_size", settings.get("size"))
            return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
        return LlavaImageProcessorPil(**settings, do_pad=pad)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{tower / 'preprocessor_config.json'} does not describe image preprocessing: {error}; "
            "copy it again from where the vision tower came from"
        ) from error


def _is_siglip(tower: Path) -> bool:
    return str(read_json(tower / "config.json").get("model_type")).startswith("siglip")


def _read_patch_size(tower: Path) -> int:
    config = read_json(tower / "config.json")
    return (config.get("vision_config") or config).get("patch_size", 14)


def load_tokenizer(checkpoint: Checkpoint, config: Any = None) -> Any:
    """Return a checkpoint's tokenizer.

    Raises:
        ConfigError: it does not load.
        MissingPackageError: it needs a package.
    """
    from transformers import CONFIG_MAPPING, AutoTokenizer

    folder = checkpoint.tokenizer_folder
    # Without it transformers reads config.json, which it does not understand in LLaVA's format.
    config = config or CONFIG_MAPPING[checkpoint.text_model_type]()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
        tokenizer("a")  # shows settings that it cannot use
        return tokenizer
    except ImportError as error:
        raise MissingPackageError(
            f"the tokenizer of {str(folder)!r} needs another package: {error}"
        ) from error
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise ConfigError(
            f"the tokenizer in {str(folder)!r} does not load: {error}; copy its files again from "
            "where the checkpoint came from"
        ) from error


def load_llava_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer of a checkpoint in LLaVA's format, with all image tokens added.

    They are added in the order of LLaVA's code, so that tokens missing from the files get its ids.

    Raises:
        ConfigError: it does not load.
        MissingPackageError: it needs a package.
    """
    tokenizer = load_tokenizer(checkpoint)
    extra = [PATCH] if checkpoint.uses_patch_token else []
    extra += START_END if checkpoint.uses_start_end else ()
    tokenizer.add_tokens([*extra, IMAGE_TOKEN], special_tokens=True)
    if not checkpoint.in_pieces:
        return tokenizer
    return run_as_llava(tokenizer, checkpoint.tokenizer_folder, checkpoint.text_model_type)


def _check_image_token(checkpoint: Checkpoint, tokenizer: Any, image_token: str) -> None:
    """Without an image token the tokenizer would split it, and the model would see no image."""
    config = checkpoint.config
    expected = config.get("image_token_index", config.get("image_token_id"))
    where = str(checkpoint.tokenizer_folder)
    if not isinstance(image_token, str):
        raise ConfigError(
            f"{checkpoint.folder / 'processor_config.json'}: image_token={image_token!r} is not "
            f"text: remove it, and {IMAGE_TOKEN!r} is used"
        )
    found = tokenizer.convert_tokens_to_ids(image_token)
    if found is None or found == tokenizer.unk_token_id:
        raise ConfigError(
            f"the tokenizer in {where!r} lacks the image token {image_token!r}, which config.json "
            f"puts at {expected}: copy tokenizer.json and tokenizer_config.json from where the "
            "checkpoint came from"
        )
    if expected is None:
        raise ConfigError(
            f"{checkpoint.folder / 'config.json'} does not say which token stands for an image: "
            f'add "image_token_index": {found}, at which the tokenizer has {image_token!r}'
        )
    if found != expected:
        raise ConfigError(
            f"the tokenizer in {where!r} has the image token {image_token!r} at {found}, and "
            f"config.json (image_token_index) at {expected}: they belong to different checkpoints"
        )
