"""A state's weights -> a folder that `load_model` takes, at any step and under any ZeRO.

projector   mm_projector.bin over the model that the run began with
lora        the adapter over that model, and what else was trained (non_lora_trainables.bin);
            in LLaVA's own layout where that model is in it, else in peft's
full        the whole model, in the layout that it had
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llava_ray.config import TrainConfig
from llava_ray.model.checkpoint.llava_format import LLAVA_CLASSES
from llava_ray.model.checkpoint.tensor_names import from_memory
from llava_ray.model.export.atomic_folder import write_json
from llava_ray.model.export.export import write_model
from llava_ray.model.export.projector import get_projector
from llava_ray.train.deepspeed_engine import TrainState
from llava_ray.train.param_groups import ADAPTER, find_lora_targets, find_param_group

Tensors = dict[str, torch.Tensor]

EXTRA_FILE = "non_lora_trainables.bin"
_PEFT = "base_model.model."


def write_weights(folder: Path, state: TrainState, config: TrainConfig) -> None:
    """Write the folder; all workers call this together, and the first one writes.

    Args:
        folder: to be made.
        state: whose weights.
        config: of the run.
    """
    export_format = choose_format(state, config)
    tensors = collect_weights(state, export_format, config)
    if dist.get_rank() != 0:
        return
    folder.mkdir(parents=True)
    if export_format == "lora":
        write_adapter(folder, state, config, tensors)
        return
    core = replace(state.core, model=_fill(state.core.model, tensors))
    base = str(name_base(config.model))
    fields = {"llava_ray_base": base} if export_format == "projector" else {}
    write_model(folder, core, export_format, fields=fields)


def choose_format(state: TrainState, config: TrainConfig) -> str:
    """Return "lora", "projector", or the format of a whole model ("hf", "original")."""
    if config.method == "lora":
        return "lora"
    checkpoint = state.core.checkpoint
    is_alone = config.method == "projector" and not config.train_vision_tower
    has_format = (
        checkpoint.text_model_type in LLAVA_CLASSES and checkpoint.model_type != "llava_onevision"
    )
    if is_alone and has_format and checkpoint.kind == "full" and not checkpoint.uses_start_end:
        return "projector"
    return "hf" if checkpoint.format == "hf" else "original"


def collect_weights(state: TrainState, export_format: str, config: TrainConfig) -> Tensors:
    """Return the tensors that a format holds, by their names in the model; empty but on worker 0.

    Of weights that ZeRO divides, one after another is put together.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    kept: Tensors = {}
    for name, parameter in state.core.model.named_parameters():
        group = find_param_group(name)
        if export_format == "projector" and group == "language_model":
            continue
        is_new = bool(config.pretrain_mm_mlp_adapter) and group == "projector"
        if export_format == "lora" and not (parameter.requires_grad or is_new):
            continue
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                kept[name] = parameter.detach().to("cpu", copy=True)
    return kept


def write_adapter(
    folder: Path, state: TrainState, config: TrainConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter and what else was trained beside it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    core = state.core
    is_original = core.checkpoint.format == "llava" and core.checkpoint.kind == "full"
    lora, extra = {}, {}
    for name, tensor in tensors.items():
        written = _name(core, name.replace(f".{ADAPTER}", ""), is_original)
        (lora if ".lora_" in name else extra)[written] = tensor.contiguous()
    save_file({f"{_PEFT}{n}": t for n, t in lora.items()}, folder / "adapter_model.safetensors")
    if extra:
        prefix = _PEFT if is_original else ""
        torch.save({f"{prefix}{n}": t for n, t in extra.items()}, folder / EXTRA_FILE)
    leaves = sorted(
        {
            name.split(".")[-2]
            for name in find_lora_targets(core.model)
            if name.endswith(".base_layer")
        }
        or {"q_proj"}
    )
    LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # LLaVA's own code has no tower yet, which has such names too, when it looks for these.
        target_modules=leaves if is_original else rf".*language_model.*\.({'|'.join(leaves)})",
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(name_base(config.model)),
    ).save_pretrained(str(folder))
    if is_original:
        fields = {**core.checkpoint.config, "llava_ray_template": core.template.name}
        write_json(folder / "config.json", fields)


def name_base(path: str) -> str | Path:
    """Return a model's name such that it is found from anywhere: folders with their whole path."""
    folder = Path(path).expanduser()
    return folder.resolve() if folder.exists() else path


def _name(core: Any, name: str, is_original: bool) -> str:
    if not is_original:
        return name
    return from_memory(
        name,
        "llava",
        text_model_type=core.checkpoint.text_model_type,
        projector=get_projector(core.model.config),
    )


def _fill(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return a model of the same kind with these weights, on the CPU; it shares nothing."""
    with torch.device("meta"):
        filled = type(model)(copy.deepcopy(model.config))
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    filled.load_state_dict({**buffers, **tensors}, strict=False, assign=True)
    filled.generation_config = model.generation_config
    return filled
