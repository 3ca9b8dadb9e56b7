"""Applies PEFT adapters to a loaded model, checks that they have an effect, and merges them.

The last step of `load_model` for LoRA checkpoints. LLaVA's own adapters name modules as LLaVA does,
others as the version of transformers that they were trained with; `tensor_names` translates both.

File formats: peft's adapter_config.json and adapter_model.safetensors (or .bin).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_ray.errors import ConfigError, MissingPackageError
from llava_ray.model.checkpoint.locate import REMEDY, read_json
from llava_ray.model.checkpoint.tensor_names import CheckpointFormat, detect_format, to_memory
from llava_ray.model.checkpoint.weights import StoredTensor, open_file

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = re.compile(r"^(base_model\.model\.|base_model\.)")
_LORA = re.compile(r"(.+)\.(lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))(?:\.(.+))?")


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
    settings = read_settings(folder)
    tensors = read_adapter(folder)
    lora, whole = sort_tensors(model, folder, tensors, settings)
    targets = sorted({name.rpartition(".lora_")[0] for name in lora})
    config = LoraConfig(**_translate_settings(settings, lora, targets))
    before = None if whole else compute_probe(model, targets)
    for name, tensor in whole.items():
        _replace(model, name, tensor)
    adapted: Any = PeftModel(model, config)
    set_peft_model_state_dict(adapted, {f"base_model.model.{n}": t[...] for n, t in lora.items()})
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


def read_settings(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        ConfigError: there is none, or it is not a LoRA.
    """
    settings = read_json(folder / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: peft_type {settings.get('peft_type')!r} adapters "
            "are not supported: use LoRA (DoRA and rank-stabilised LoRA included)"
        )
    return settings


def read_adapter(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's tensors by their names in the file, without peft's prefix.

    Raises:
        ConfigError: there are none, or the file is damaged.
    """
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return {_PREFIX.sub("", n): t for n, t in open_file(folder / name).items()}
    raise ConfigError(
        f"{folder} lacks the adapter's weights ({' or '.join(ADAPTER_FILES)}): {REMEDY}"
    )


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


def find_place(name: str, file_format: CheckpointFormat) -> str | None:
    """Return the name in memory of a module as an adapter's file names it."""
    place = to_memory(f"{name}.weight", file_format)
    return place.removesuffix(".weight") if place else None


def sort_tensors(
    model: Any, folder: Path, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return an adapter's low-rank tensors and its full-size ones, by their names in memory.

    Raises:
        ConfigError: the model has no parameter or module for one of them.
    """
    file_format = detect_format(tensors)
    modules = dict(model.named_modules())
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    lora: dict[str, StoredTensor] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            place = to_memory(
                re.sub(r"\.(modules_to_save(\.default)?|base_layer)", "", name), file_format
            )
            if place is None or parameters.get(place) != tensor.shape:
                raise refuse_base(folder, name, tensor, settings)
            whole[place] = tensor
            continue
        place = find_place(match[1], file_format)
        module = modules.get(place or "")
        if module is None or not _fits(module, match[2], tensor.shape):
            raise refuse_base(folder, name, tensor, settings)
        suffix = "" if match[2] != "lora_A" and match[2] != "lora_B" else ".weight"
        lora[f"{place}.{match[2]}{suffix}"] = tensor
    if not lora and not whole:
        raise ConfigError(f"the adapter in {folder} holds no tensors: {REMEDY}")
    return lora, whole


def _fits(module: Any, kind: str, shape: tuple[int, ...]) -> bool:
    """Return whether a low-rank tensor's shape fits its module."""
    if kind.startswith("lora_embedding"):
        size = module.num_embeddings if kind.endswith("A") else module.embedding_dim
        return shape[1 if kind.endswith("A") else 0] == size
    if not hasattr(module, "in_features"):
        return kind == "lora_magnitude_vector" or len(shape) != 2
    if kind == "lora_A":
        return shape[1] == module.in_features
    return shape[0] == module.out_features


def _translate_settings(
    settings: Mapping[str, Any], lora: Mapping[str, StoredTensor], targets: list[str]
) -> dict[str, Any]:
    """Return LoraConfig's arguments for exactly the modules that have tensors.

    Ranks are read from the tensors' shapes.
    """
    ranks = {
        name.rpartition(".lora_")[0]: tensor.shape[0]
        for name, tensor in lora.items()
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
        "bias": "none",
        "inference_mode": True,
    }


def find_alphas(settings: Mapping[str, Any], targets: list[str]) -> dict[str, float]:
    """Return the alphas of modules that have one of their own (`alpha_pattern`).

    The patterns match module names, of which only the end is the same in every format.
    """
    alphas = {}
    for target in targets:
        for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
            end = re.sub(r"^.*?(layers|blocks)\b", r"\1", pattern)
            if re.fullmatch(rf"(.*\.)?({end})", target):
                alphas[target] = alpha
    return alphas


@torch.no_grad()
def _replace(model: Any, name: str, tensor: StoredTensor) -> None:
    parameter = model.get_parameter(name)
    parameter.copy_(tensor[...])


def refuse_base(
    folder: Path, name: str, tensor: StoredTensor, settings: Mapping[str, Any]
) -> ConfigError:
    """Return the error for a tensor that does not fit the model."""
    made_for = settings.get("base_model_name_or_path")
    hint = f" ({made_for!r}, says its adapter_config.json)" if made_for else ""
    return ConfigError(
        f"{tensor.file} changes {name!r} {list(tensor.shape)}, and the base has nothing of that "
        f"name and shape: the adapter in {folder} was trained on another model; give that{hint} as "
        "base"
    )
