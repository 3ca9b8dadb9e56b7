"""Which parameters are trained, at which learning rate: vision tower, projector, language model.

Runs between `load_model` and DeepSpeed: freezes the other parameters, adds LoRA to the language
model and sorts the trainable parameters into the optimizer's groups.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from llava_ray.config import TrainConfig
from llava_ray.errors import ConfigError, MissingPackageError

ParamGroup = Literal["vision_tower", "projector", "language_model"]

PARAM_GROUPS: tuple[ParamGroup, ...] = ("vision_tower", "projector", "language_model")
_PREFIXES: dict[str, ParamGroup] = {
    "model.vision_tower.": "vision_tower",
    "model.multi_modal_projector.": "projector",
    "model.image_newline": "projector",
}
TRUNK = "model.language_model."
ADAPTER = "default"
"""The name that peft gives an adapter within a model."""


class ParamGroupSummary(NamedTuple):
    """What is trained of one part of the model; rates are None if it is frozen."""

    name: ParamGroup
    num_parameters: int
    num_trainable: int
    learning_rate: float | None
    weight_decay: float | None

    def describe(self) -> str:
        """Return it as a line of a log."""
        if not self.num_trainable:
            return f"{self.name}: frozen, {self.num_parameters:,} parameters"
        return (
            f"{self.name}: trains {self.num_trainable:,} of {self.num_parameters:,} parameters, "
            f"learning rate {self.learning_rate:g}, weight decay {self.weight_decay:g}"
        )


def find_param_group(name: str) -> ParamGroup:
    """Return the part that a parameter belongs to, by its name in the model."""
    for prefix, group in _PREFIXES.items():
        if name.startswith(prefix):
            return group
    return "language_model"


def select_trainable(model: Any, config: TrainConfig) -> None:
    """Freeze what rests and make what is trained trainable, adapters included.

    Args:
        model: as `load_model` gives it; changed in place.
        config: of the run.

    Raises:
        MissingPackageError: LoRA needs peft.
        ConfigError: nothing would be trained.
    """
    trained: set[ParamGroup] = {"projector"} if config.train_projector else set()
    trained |= {"vision_tower"} if config.train_vision_tower else set()
    trained |= {"language_model"} if config.method == "full" else set()
    for name, parameter in model.named_parameters():
        is_float = parameter.is_floating_point()
        parameter.requires_grad_(is_float and find_param_group(name) in trained)
    _rest_unused_layers(model)
    if config.method == "lora":
        add_lora(model, config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"method={config.method!r} would train nothing, as this model's projector has no "
            "weights: set method=full or lora"
        )


def find_lora_targets(model: nn.Module) -> list[str]:
    """Return the modules that get adapters: every linear layer of the language model but its head.

    LLaVA's own choice. Names are those in the model.
    """
    is_target = (nn.Linear,)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(TRUNK) and isinstance(module, is_target)
    ]


def add_lora(model: Any, config: TrainConfig) -> None:
    """Put untrained low-rank adapters into a model's language model (Hu et al. 2021).

    Raises:
        MissingPackageError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackageError(
            "method='lora' needs peft: pip install 'llava-ray[train]'"
        ) from error
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=find_lora_targets(model),
        bias="none",
        task_type="CAUSAL_LM",
    )
    is_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter or is_trained.get(name, False))
        if is_adapter:
            parameter.data = parameter.data.to(model.dtype)


def make_optimizer_groups(model: Any, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: each part by itself, matrices apart from norms and biases.

    Returns:
        Groups with `params`, `lr`, `max_lr`, `weight_decay` and `part`, none of them empty.
    """
    groups: list[dict[str, Any]] = []
    for group in PARAM_GROUPS:
        members = [p for name, p in _find_trained(model) if find_param_group(name) == group]
        rate, decay = _read_rates(group, config)
        for has_decay in (True, False):
            params = [p for p in members if (p.ndim > 1) == has_decay]
            if params:
                groups.append(
                    {
                        "params": params,
                        "lr": rate,
                        "max_lr": rate,
                        "weight_decay": decay if has_decay else 0.0,
                        "part": group,  # the name under which checkpoints have it
                    }
                )
    return groups


def summarize_param_groups(model: Any, config: TrainConfig) -> list[ParamGroupSummary]:
    """Return what becomes of each part."""
    states = []
    for group in PARAM_GROUPS:
        members = [p for name, p in model.named_parameters() if find_param_group(name) == group]
        num_trainable = sum(count_elements(p) for p in members if p.requires_grad)
        rate, decay = _read_rates(group, config) if num_trainable else (None, None)
        num_parameters = sum(count_elements(p) for p in members)
        states.append(ParamGroupSummary(group, num_parameters, num_trainable, rate, decay))
    return states


def count_elements(parameter: Any) -> int:
    """Return how many numbers a parameter has, also one that ZeRO divides or that is quantized."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def _find_trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _read_rates(group: ParamGroup, config: TrainConfig) -> tuple[float, float]:
    rate, decay = {
        "projector": (config.mm_projector_lr, config.mm_projector_weight_decay),
        "vision_tower": (config.vision_lr, config.vision_weight_decay),
        "language_model": (None, None),
    }[group]
    return (
        config.learning_rate if rate is None else rate,
        config.weight_decay if decay is None else decay,
    )


def _rest_unused_layers(model: Any) -> None:
    """Freeze what the tower has and LLaVA, which reads an inner layer, never computes.

    They would get no gradient, for which ZeRO waits.
    """
    tower = model.model.vision_tower
    for name in ("post_layernorm", "head"):
        if (module := getattr(tower, name, None)) is not None:
            module.requires_grad_(False)
    layer = model.config.vision_feature_layer
    layers = tower.encoder.layers
    if isinstance(layer, int):
        last = layer if layer >= 0 else len(layers) + 1 + layer
        for unused in list(layers)[last:]:
            unused.requires_grad_(False)
