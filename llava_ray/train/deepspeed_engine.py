"""Load a run's model, choose its trainable parameters and build DeepSpeed's engine around it.

Called by `loop` on each worker, after torch.distributed is initialized.
"""

import ctypes
import importlib.util
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.checkpoint.inspect import inspect_checkpoint
from llava_ray.model.checkpoint.tensor_names import to_memory
from llava_ray.model.checkpoint.weights import open_file, open_weights
from llava_ray.model.devices import select_device
from llava_ray.model.loading import LoadedModel, load_model
from llava_ray.model.precision import has_fast_bfloat16
from llava_ray.train.deepspeed_config import describe_engine, read_stage
from llava_ray.train.inputs import Inputs, encode_blank_image
from llava_ray.train.param_groups import (
    ParamGroupSummary,
    make_optimizer_groups,
    select_trainable,
    summarize_param_groups,
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Option numbers from glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, since each step allocates as much as the one before.

    Otherwise, depending on the layout of its heap, a process may return the memory to the system
    and take a page fault for each page again in every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@dataclass(frozen=True)
class TrainState:
    """The model being trained on this worker, with DeepSpeed's engine.

    Attributes:
        core: The loaded model and its processor.
        engine: DeepSpeed's engine, which wraps the same model.
        blank: Inputs of a grey image; see `inputs.encode_blank_image`.
        param_groups: What is trained of each part of the model.
        stage: ZeRO stage.
        device: Device of this worker.
    """

    core: LoadedModel
    engine: Any
    blank: Inputs
    param_groups: list[ParamGroupSummary]
    stage: int
    device: torch.device


def build_train_state(config: TrainConfig, *, universal: bool = False) -> TrainState:
    """Load a run's model on this worker and build DeepSpeed's engine.

    Args:
        config: Settings of the run.
        universal: The state to be restored is a universal checkpoint.

    Raises:
        ConfigError: The model cannot be loaded or the DeepSpeed configuration is wrong.
        MissingPackageError: DeepSpeed, peft, bitsandbytes or Liger is missing.
    """
    device = select_device("auto")
    is_gpu = device.type == "cuda"
    deepspeed = import_deepspeed(is_gpu=is_gpu)
    if is_gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    core = load_for_training(config, device)
    model: Any = core.model
    select_trainable(model, config)
    described = describe_engine(
        config,
        num_workers=dist.get_world_size(),
        hidden_size=model.config.text_config.hidden_size,
        is_bf16=model.dtype == torch.bfloat16,
    )
    if universal:
        described["checkpoint"] = {"load_universal": True}
    param_groups = summarize_param_groups(model, config)
    optimizer = make_optimizer(model, config)
    blank = encode_blank_image(core)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=described)
    if not is_gpu:
        keep_freed_memory()
    return TrainState(core, engine, blank, param_groups, read_stage(described), device)


def choose_attention(name: str, *, is_gpu: bool, is_bf16: bool) -> str:
    """Return the attention implementation that the setting stands for on this worker."""
    if name != "auto":
        return name
    is_flash = is_gpu and is_bf16 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if is_flash else "sdpa"


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.AdamW:
    """Return the run's optimizer, in torch's fused version.

    Otherwise torch updates weights one by one on a CPU, where offloading has them on GPU machines
    too, and needs one more copy of a partition on a GPU.
    """
    return torch.optim.AdamW(
        make_optimizer_groups(model, config),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def load_for_training(config: TrainConfig, device: torch.device) -> LoadedModel:
    """Load a run's model in the run's precision, in training mode.

    Raises:
        ConfigError: The model cannot be loaded.
        MissingPackageError: A package is missing.
    """
    is_gpu = device.type == "cuda"
    is_bf16 = config.bf16 if config.bf16 != "auto" else is_gpu and has_fast_bfloat16(device)
    if config.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)
    core = load_model(
        config.model,
        base=config.base,
        vision_tower=config.vision_tower,
        dtype="bfloat16" if is_bf16 else "float32",
        device=str(device),
        quantization=config.quantization,
        attention=choose_attention(config.attention, is_gpu=is_gpu, is_bf16=is_bf16),
        template=config.template,
    )
    model: Any = core.model
    if config.pretrain_mm_mlp_adapter:
        load_projector(model, config.pretrain_mm_mlp_adapter)
    if config.use_liger_kernel:
        _apply_liger(model)
    model.train()
    model.config.use_cache = model.config.text_config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return core


@torch.no_grad()
def load_projector(model: Any, path: str) -> None:
    """Copy a trained projector, and the row-end embedding of tiles, into a model.

    Args:
        model: The model, changed in place.
        path: A complete checkpoint, or a folder with mm_projector.bin.

    Raises:
        ConfigError: A tensor is missing or has another shape.
    """
    from llava_ray.model.checkpoint.locate import find_folder

    folder = find_folder(path)
    if (folder / "mm_projector.bin").is_file():
        found = open_file(folder / "mm_projector.bin")
        stored = {to_memory(name, "llava"): tensor for name, tensor in found.items()}
    else:
        stored = dict(open_weights(inspect_checkpoint(path).weights))
    places = ("model.multi_modal_projector.", "model.image_newline")
    for name, parameter in model.named_parameters():
        if not name.startswith(places):
            continue
        tensor = stored.get(name)
        if tensor is None and name == places[1]:
            continue  # the first stage has no tiles
        if tensor is None or tensor.shape != tuple(parameter.shape):
            seen = "nothing" if tensor is None else list(tensor.shape)
            raise ConfigError(
                f"pretrain_mm_mlp_adapter={path!r} does not fit the model: {name} has shape "
                f"{list(parameter.shape)}, the file has {seen}; give a projector that was trained "
                "for this model"
            )
        parameter.copy_(tensor[...])


def import_deepspeed(*, is_gpu: bool) -> Any:
    """Import DeepSpeed, configured for GPUs or CPUs.

    Raises:
        MissingPackageError: It is not installed.
    """
    if not is_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found no accelerator
    try:
        import deepspeed
    except ImportError as error:
        raise MissingPackageError(
            f"training needs DeepSpeed ({error}): pip install 'llava-ray[train]'"
        ) from error
    if not is_gpu:
        # Otherwise it spends a minute compiling an all-reduce that only inference uses.
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
    # DeepSpeed calls functions that torch.distributed has deprecated.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    return deepspeed


def _apply_liger(model: Any) -> None:
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            _apply_liger_kernel_to_instance,
        )
    except ImportError as error:
        raise MissingPackageError(
            "use_liger_kernel needs Liger: pip install liger-kernel"
        ) from error
    _apply_liger_kernel_to_instance(model=model.model.language_model)
