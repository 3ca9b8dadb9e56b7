"""Applies PEFT adapters to a loaded model, checks that they have an effect, and merges them.

The last step of `load_model` for LoRA checkpoints: `adapter_files` reads the folder, peft computes.
"""

import re
from pathlib import Path
from typing import Any

import torch

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.adapter_files import Adapter, find_alphas, open_adapter
from llava_ray.model.checkpoint.weights import StoredTensor


def apply_adapter(model: Any, folder: Path, *, merge: bool = True) -> Any:
    """Return the model with the adapter applied.

    Args:
        model: a class of transformers or of `modeling`; it is changed in place.
        folder: holds adapter_config.json and the adapter's weights.
        merge: add the adapter to the weights; quantized weights need it to stay separate.

    Raises:
        ConfigError: the adapter is not a LoRA, is damaged, was trained on another base, or has no
            effect on the logits.
        MissingPackageError: peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise MissingPackageError(
            f"{folder} is an adapter, which needs peft: pip install 'llava-ray[train]'"
        ) from error
    adapter = open_adapter(
        folder, list_shapes(model), is_tied=model.config.get_text_config().tie_word_embeddings
    )
    config = LoraConfig(**_translate_settings(adapter))
    targets = adapter.targets
    before = None if adapter.whole else compute_probe(model, targets)
    if adapter.num_rows:
        model.resize_token_embeddings(adapter.num_rows, mean_resizing=False)
    for name, tensor in adapter.whole.items():
        _replace(model, name, tensor)
    adapted: Any = PeftModel(model, config)
    set_peft_model_state_dict(
        adapted, {f"base_model.model.{n}": t[...] for n, t in adapter.lora.items()}
    )
    adapted.eval()
    if before is not None and torch.equal(before, compute_probe(adapted.base_model.model, targets)):
        raise ConfigError(
            f"the adapter in {folder} changes no logits: its weights are all zero, or were saved "
            "before training began; train it, or load its base alone"
        )
    if not merge:
        return adapted.base_model.model
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(
            f"the adapter in {folder} cannot be merged: {error}; its training may have diverged"
        ) from error


@torch.inference_mode()
def compute_probe(model: Any, targets: list[str]) -> torch.Tensor:
    """Return logits of fixed tokens, and image features if an adapter changes vision modules.

    Args:
        model: a loaded LLaVA.
        targets: names of the modules that an adapter changes.
    """
    config = model.config
    ids = torch.arange(3, 11, device=model.device)[None] % config.text_config.vocab_size
    text = model.lm_head(model.model.language_model(input_ids=ids, use_cache=False)[0])
    if all(name.startswith(("model.language_model.", "lm_head")) for name in targets):
        return text.float()
    side = config.vision_config.image_size
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    states = model.model.vision_tower(
        noise.to(model.device, model.dtype), output_hidden_states=True
    ).hidden_states[config.vision_feature_layer]
    return torch.cat([text.flatten(), model.model.multi_modal_projector(states).flatten()]).float()


def list_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors by their names; those that layers have unquantized."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def _translate_settings(adapter: Adapter) -> dict[str, Any]:
    """Return LoraConfig's arguments for exactly the modules that have tensors.

    Ranks are read from the tensors' shapes.
    """
    settings, targets = adapter.settings, adapter.targets
    ranks = {
        name.rpartition(".lora_")[0]: tensor.shape[0]
        for name, tensor in adapter.lora.items()
        if ".lora_A" in name or name.endswith("lora_embedding_A")
    }
    alphas = find_alphas(settings, targets)
    usual = int(settings.get("r") or 8)
    return {
        "r": usual,
        "lora_alpha": settings.get("lora_alpha", 8),
        "target_modules": targets,
        "rank_pattern": {f"^{re.escape(t)}$": r for t, r in ranks.items() if r != usual},
        "alpha_pattern": {f"^{re.escape(t)}$": alpha for t, alpha in alphas.items()},
        "use_rslora": bool(settings.get("use_rslora")),
        "use_dora": bool(settings.get("use_dora")),
        "fan_in_fan_out": False,
        "lora_bias": any(name.endswith(".lora_B.bias") for name in adapter.lora),
        "bias": "none",
        "inference_mode": True,
    }


@torch.no_grad()
def _replace(model: Any, name: str, tensor: StoredTensor) -> None:
    parameter = model.get_parameter(name)
    parameter.copy_(tensor[...])
