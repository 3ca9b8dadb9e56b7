"""Loads a checkpoint's model, and encodes text and images into its inputs.

Engines, training and evaluation all get their model from `load_model`.

path -> OpenedCheckpoint (no weights read) -> transformers' model, adapters merged -> LoadedModel

Shapes: B samples, T tokens, N images, C H W pixels.
"""

import contextlib
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.anyres import count_image_tokens
from llava_ray.model.architecture import Architecture, check_weights, find_unmarked
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.quantized import find_leftover
from llava_ray.model.checkpoint.weights import StoredTensor, check_deltas
from llava_ray.model.choose_template import find_stop_ids
from llava_ray.model.devices import describe_shortage, select_device
from llava_ray.model.open_checkpoint import OpenedCheckpoint, open_checkpoint, read_context_length
from llava_ray.model.precision import choose_dtype
from llava_ray.model.processor import arrange_images, encode_images, mark_images
from llava_ray.model.processor_check import check_processor
from llava_ray.model.transformers_output import no_progress_bars
from llava_ray.template import (
    IMAGE_PLACEHOLDER,
    Template,
    check_images,
    tokenize_pieces,
)

if TYPE_CHECKING:
    from PIL import Image as PILImage

logger = logging.getLogger(__name__)

Quantization = Literal["4bit", "8bit"]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class LoadedModel:
    """A loaded LLaVA with everything that prompting it needs.

    Attributes:
        model: transformers' module, on its device and in evaluation mode.
        processor: transformers' processor: the tokenizer and the image preprocessing.
        tokenizer: the processor's tokenizer.
        template: renders conversations into prompts.
        context_length: the maximum length of prompt and answer together, in tokens.
        image_token_id: the id that stands for one patch of an image. In LLaVA's format it may lie
            outside the vocabulary; the embedding layer then clamps it.
        eos_token_ids: generation stops at any of these.
        checkpoint: what was found in the folder.
    """

    model: Any
    processor: Any
    tokenizer: Any
    template: Template
    context_length: int
    image_token_id: int
    eos_token_ids: frozenset[int]
    checkpoint: Checkpoint

    def encode(self, text: str, images: Sequence["PILImage.Image"] = ()) -> dict[str, torch.Tensor]:
        """Return the model's inputs for one prompt, on the CPU.

        Checkpoints in LLaVA's format get the ids and pixels of LLaVA's own code, checkpoints in
        transformers' format those of its processors.

        Args:
            text: the prompt, with one `<image>` for each image, in order.
            images: the images, RGB.

        Returns:
            `input_ids` and `attention_mask` [1, T], each `<image>` expanded to as many ids as the
            image has tokens. With images also `pixel_values` in float32: [N, C, H, W], or for
            anyres [N, tiles, C, H, W] together with `image_sizes` [N, 2] (height, width); for
            LLaVA-OneVision also `batch_num_images` [1], and several images have one tile each.

        Raises:
            RequestError: the number of images differs from the number of `<image>` in the text.
        """
        check_images(text, len(images), self.processor.image_token)
        if self.checkpoint.format == "llava":
            return self._encode_as_llava(text, images)
        if self.checkpoint.uses_start_end:
            text = mark_images(text)
        bos = self.tokenizer.bos_token
        inputs = self.processor(
            text=text,
            images=arrange_images(self.processor, images) if images else None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_tensors="pt",
        )
        return dict(inputs)

    def tokenize(self, text: str) -> list[int]:
        """Return a prompt's ids, with -200 for each image; see `encode`."""
        if self.checkpoint.uses_start_end:
            text = mark_images(text)
        if self.checkpoint.in_pieces:
            return tokenize_pieces(self.tokenizer, text)
        bos = self.tokenizer.bos_token
        begins = not (bos and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=begins).input_ids
        return [IMAGE_PLACEHOLDER if id_ == self.image_token_id else id_ for id_ in ids]

    def _encode_as_llava(
        self, text: str, images: Sequence["PILImage.Image"]
    ) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        counts: Iterator[int] = iter(())
        if images:
            inputs = encode_images(self.processor, images)
            config = self.model.config
            sizes = [(image.height, image.width) for image in images]
            counts = iter([count_image_tokens(config, size) for size in sizes])
        ids: list[int] = []
        for id_ in self.tokenize(text):
            is_image = id_ == IMAGE_PLACEHOLDER
            ids += [self.image_token_id] * next(counts) if is_image else [id_]
        ids_1T = torch.tensor([ids])
        return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), **inputs}


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Put off garbage collection inside the block.

    A model's many small objects would start it several times, and each time it looks through all
    objects of all packages, which takes longer than reading a small model.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "auto",
    quantization: Quantization | None = None,
    attention: str = "sdpa",
    template: str | None = None,
) -> LoadedModel:
    """Load any LLaVA checkpoint.

    Its kind is recognised from its files: transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision;
    LLaVA's own format as full weights, as a projector or LoRA over a base, or as a delta over a
    base; and any PEFT adapter over one of these.

    Args:
        path: a folder, a hub name, an address that fsspec knows, or "demo" for the embedded model.
        base: the model that a projector, an adapter or a delta belongs to; adapters usually name
            theirs.
        vision_tower: folder or hub name of the vision tower, for LLaVA's format; by default the one
            that config.json names.
        dtype: precision of the weights in memory. "auto" is bfloat16 where the device computes in
            it, else float16 on a GPU and float32 on a CPU (see `precision`). "stored" is the files'
            16-bit dtype if they all have the same one, otherwise float32, so that no precision is
            lost.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".
        quantization: "4bit" or "8bit" (bitsandbytes), of the language model's linear layers.
        attention: transformers' name of the attention implementation ("sdpa", "eager",
            "flash_attention_2").
        template: name of a conversation template, instead of the one that the files point to; or
            "own" for the chat template that comes with the checkpoint.

    Raises:
        ConfigError: the folder is missing, is not a checkpoint of a known kind, or its files do not
            belong together; the message names the file and what to do.
        MissingPackageError: an optional package is needed.
    """
    opened = open_checkpoint(path, base=base, vision_tower=vision_tower, template=template)
    return load_opened(
        opened, dtype=dtype, device=device, quantization=quantization, attention=attention
    )


@_without_garbage_collection()
def load_opened(
    opened: OpenedCheckpoint,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "auto",
    quantization: Quantization | None = None,
    attention: str = "sdpa",
) -> LoadedModel:
    """Load the model of a checkpoint that has been opened; see `load_model`."""
    checkpoint = opened.checkpoint
    target = select_device(device)
    precision = torch.float32 if dtype == "stored" else select_dtype(dtype, target)
    if dtype == "stored" and not checkpoint.adapters:  # merging one in 16 bits would lose precision
        precision = _find_stored_dtype(opened.stored.values())
    processor = opened.processor
    check_processor(checkpoint, processor, opened.architecture.config)
    problems = check_weights(checkpoint, opened.architecture, opened.stored)
    problems += find_unmarked(checkpoint, opened.architecture, processor.tokenizer)
    if problems:
        raise ConfigError(problems[0])
    if method := find_leftover(checkpoint):
        logger.warning(
            f"{checkpoint.folder}: the weights are plain, and config.json's quantization_config "
            f"({method}) is left over: it is ignored"
        )
    template = opened.template
    check_deltas(checkpoint.weights, checkpoint.text_model_type)
    model = build_model(
        checkpoint,
        opened.architecture,
        opened.stored,
        dtype=precision,
        device=target,
        quantization=quantization,
        attention=attention,
    )
    for folder in checkpoint.adapters:
        from llava_ray.model.lora import apply_adapter

        model = apply_adapter(model, folder, merge=quantization is None)
    stop_ids = find_stop_ids(template, processor.tokenizer)
    return LoadedModel(
        model=model.eval(),
        processor=processor,
        tokenizer=processor.tokenizer,
        template=template,
        context_length=read_context_length(model.config.text_config),
        image_token_id=model.config.image_token_id,
        eos_token_ids=_find_eos(model, processor.tokenizer) | stop_ids,
        checkpoint=checkpoint,
    )


def load_without_weights(path: str | Path, *, template: str | None = None) -> LoadedModel:
    """Load all of a checkpoint in transformers' format but its weights.

    For engines that load the model themselves: the result encodes and decodes, and its `model` has
    nothing but a configuration.

    Raises:
        ConfigError: as in `load_model`.
    """
    opened = open_checkpoint(path, template=template)
    checkpoint = opened.checkpoint
    if checkpoint.format != "hf":
        raise ConfigError(f"{str(path)!r} is not in transformers' format: export it with --to hf")
    config, processor = opened.config, opened.processor
    check_processor(checkpoint, processor, config)
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=None))
    model.generation_config = _read_generation_config(checkpoint, model)
    stop_ids = find_stop_ids(opened.template, processor.tokenizer)
    return LoadedModel(
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        template=opened.template,
        context_length=opened.context_length,
        image_token_id=config.image_token_id,
        eos_token_ids=_find_eos(model, processor.tokenizer) | stop_ids,
        checkpoint=checkpoint,
    )


def select_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that a name in the configuration stands for on a device.

    Raises:
        ConfigError: the name is not known.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return choose_dtype(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: use one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _find_stored_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """Return the 16-bit dtype that all tensors of a checkpoint share, otherwise float32."""
    names = {each.dtype for each in stored if each.dtype in ("F16", "BF16", "F32", "F64")}
    if len(names) != 1:
        return torch.float32
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(names.pop(), torch.float32)


def build_model(
    checkpoint: Checkpoint,
    architecture: Architecture,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None,
    attention: str,
) -> Any:
    """Return the model with its weights, which are read straight into its parameters.

    Raises:
        ConfigError: the weights cannot be read, or the attention implementation is not available.
        MissingPackageError: attention or quantization needs a package.
    """
    from safetensors import SafetensorError

    tensors = {name: stored[name] for name in architecture.shapes if name in stored}
    try:
        with no_progress_bars():
            loaded: Any = architecture.model_class.from_pretrained(
                None,
                config=architecture.config,
                state_dict=tensors,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=_choose_attention(checkpoint, attention),
                quantization_config=_describe_quantization(quantization, dtype),
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights in {str(checkpoint.folder)!r} do not fit in the GPU's memory: "
            f"{describe_shortage(error)}; end what else uses this GPU, take a larger one, or "
            "spread the model over several with engine=vllm"
        ) from error
    except ImportError as error:
        raise MissingPackageError(
            f"attention={attention!r} or quantization={quantization!r} needs a package: {error}"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the weights in {str(checkpoint.folder)!r} do not load: {error}; fetch them again"
        ) from error
    model, _ = loaded
    model.config._name_or_path = str(
        checkpoint.folder
    )  # peft writes this into adapters as their base
    model.generation_config = _read_generation_config(checkpoint, model)
    return model


def _choose_attention(checkpoint: Checkpoint, attention: str) -> str | dict[str, str]:
    """MPT adds a bias for each distance (ALiBi), which only eager attention supports."""
    if checkpoint.text_model_type != "mpt":
        return attention
    return {"": attention, "vision_config": attention, "text_config": "eager"}


def _describe_quantization(quantization: Quantization | None, dtype: torch.dtype) -> Any:
    if quantization is None:
        return None
    if quantization not in get_args(Quantization):
        raise ConfigError(f"quantization={quantization!r} is not known: use 4bit, 8bit or none")
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise MissingPackageError(
            f"quantization={quantization!r} needs bitsandbytes: pip install 'llava-ray[quant]'"
        )
    whole = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )


def _read_generation_config(checkpoint: Checkpoint, model: Any) -> Any:
    from transformers import GenerationConfig

    for folder in (checkpoint.folder, checkpoint.tokenizer_folder):
        if (folder / "generation_config.json").is_file():
            try:
                return GenerationConfig.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{folder / 'generation_config.json'} cannot be used: {error}; remove it"
                ) from error
    return model.generation_config


def _find_eos(model: Any, tokenizer: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
