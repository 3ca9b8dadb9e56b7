"""Converts projectors between the formats: transformers' has two linear layers, LLaVA's any number.

For the writers. A projector of fewer than two layers becomes two without an activation, of which
the second (for `identity` both) is an identity; the other direction reverses that.
"""

from typing import Any

import torch

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.tensor_names import count_projector_layers

PREFIX = "model.multi_modal_projector."


def get_projector(config: Any) -> str:
    """Return a projector's type as LLaVA names it, for a model of transformers or `modeling`."""
    return getattr(config, "mm_projector_type", "mlp2x_gelu")


def pad_projector(model: Any, projector: str) -> dict[str, torch.Tensor]:
    """Return two linear layers that compute the same as fewer layers, without an activation."""
    width = model.config.text_config.hidden_size
    dtype = model.lm_head.weight.dtype
    same = torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    weight, bias = same
    if count_projector_layers(projector):
        layer = model.model.multi_modal_projector.linear_1
        weight, bias = layer.weight, layer.bias
    return {
        "linear_1.weight": weight,
        "linear_1.bias": bias,
        "linear_2.weight": same[0].clone(),
        "linear_2.bias": same[1].clone(),
    }


def read_projector(model: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Return a projector's type as LLaVA names it, and its tensors by their names in memory.

    Raises:
        ConfigError: LLaVA has no such projector.
    """
    config = model.config
    tensors = {n: t for n, t in model.state_dict().items() if n.startswith(PREFIX)}
    weights = {n: t for n, t in tensors.items() if n.endswith(".weight")}
    for name, weight in weights.items():  # LLaVA's always have a bias
        bias = name.replace(".weight", ".bias")
        tensors.setdefault(bias, torch.zeros(weight.shape[0], dtype=weight.dtype))
    projector = get_projector(config)
    if projector != "mlp2x_gelu" or config.projector_hidden_act == "gelu":
        return projector, tensors
    if config.projector_hidden_act == "linear":  # as `hf_writer` writes fewer than two layers
        same = {n: _changes_nothing(tensors, f"{PREFIX}{n}") for n in ("linear_1", "linear_2")}
        if same["linear_2"]:
            if same["linear_1"]:
                return "identity", {}
            return "linear", {n: t for n, t in tensors.items() if "linear_1" in n}
    raise ConfigError(
        f"LLaVA's own projectors have a GELU between their layers, and this one has "
        f"projector_hidden_act={config.projector_hidden_act!r}: use --to hf"
    )


def _changes_nothing(tensors: dict[str, torch.Tensor], layer: str) -> bool:
    weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    if weight.shape[0] != weight.shape[1] or bias.any():
        return False
    return torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype))
