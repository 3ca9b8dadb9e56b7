"""Tells quantized weights from plain ones, by what is stored and not by what config.json says.

`OpenedCheckpoint.stored` checks here before anything is computed from the tensors: read as plain
numbers, quantized weights are wrong by their own size. Configurations keep a `quantization_config`
after weights were merged and saved in full precision, so that alone says nothing.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import Checkpoint
from llava_ray.model.checkpoint.weights import StoredTensor

_FLOATS = ("F64", "F32", "F16", "BF16")
_METHODS = {
    r"weight_scale_inv": "fp8",
    r"weight_packed|weight_shape|weight_zero_point|weight_global_scale": "compressed-tensors",
    r"weight_scale|input_scale|activation_scale": "fp8 or compressed-tensors",
    r"qweight|qzeros|scales|g_idx": "gptq or awq",
    r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+": "bitsandbytes, 4 bits",
    r"SCB|weight_format": "bitsandbytes, 8 bits",
}
"""The method by the last part of the names of the tensors that it stores beside the weights."""


def find_leftover(checkpoint: Checkpoint) -> str:
    """Return the method of a checkpoint's `quantization_config`; "" if it has none.

    Once `check_quantization` has passed, the weights are plain and the field is left over.
    """
    return next((_name_method(each) for each in _find_configs(checkpoint.config)), "")


def check_quantization(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> None:
    """Check that weights are plain numbers.

    Args:
        checkpoint: the inspected checkpoint.
        stored: its tensors by their names in memory.

    Raises:
        ConfigError: they are quantized; the message names the method and what can serve them.
    """
    if (found := _find_quantized(stored)) is None:
        return
    name, method = found
    method = find_leftover(checkpoint) or method
    remedy = "give the folder of the weights before they were quantized"
    if checkpoint.format == "hf" and checkpoint.kind == "full":
        remedy = f"serve the folder with engine: vllm, or {remedy}"
    if method.startswith("bitsandbytes"):
        remedy += "; quantization: 4bit or 8bit quantizes those while they load"
    raise ConfigError(
        f"{stored[name].file}: the weights are quantized ({method}: {name} is "
        f"{stored[name].dtype}), which is not computed here: {remedy}"
    )


def _find_quantized(stored: Mapping[str, StoredTensor]) -> tuple[str, str] | None:
    """Return the name of a tensor that only quantized weights have, and the method it speaks of."""
    for name in stored:
        for ending, method in _METHODS.items():
            if re.search(rf"\.({ending})$", name):
                return name, method
    for name, tensor in stored.items():
        if name.endswith("weight") and tensor.dtype not in _FLOATS:
            return name, "fp8" if tensor.dtype.startswith("F8") else "integers"
    return None


def _find_configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and isinstance(part.get(name), Mapping):
                yield part[name]


def _name_method(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method") or "unknown")
    for bits in (4, 8):
        if config.get(f"load_in_{bits}bit"):
            return f"bitsandbytes, {bits} bits"
    return method
