"""Writers of checkpoints that need a base model: a projector alone, a LoRA, any other adapter."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.llava_checkpoints import Original

RANK, ALPHA = 4, 12
TARGETS = ("self_attn.q_proj", "mlp.down_proj")


def write_projector_only(original: Original, folder: Path) -> Path:
    original.write_config(folder)
    torch.save(original.projector_tensors(), folder / "mm_projector.bin")
    original.write_tower(folder.parent / "the-tower")
    return folder


def make_lora(original: Original, *, seed: int = 5, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Return LoRA tensors for some modules, named as LLaVA names them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in original.lm.named_modules():
        if name.endswith(TARGETS):
            a = torch.randn(RANK, module.in_features, generator=generator) * scale
            b = torch.randn(module.out_features, RANK, generator=generator) * scale
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], base: str, **more) -> Path:
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "down_proj"],
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def write_lora(original: Original, folder: Path, tensors=None, **more) -> Path:
    """Write what LLaVA's trainer saves at the end of a LoRA run."""
    write_adapter(folder, make_lora(original) if tensors is None else tensors, "the/base", **more)
    original.write_config(folder)
    trained = {f"base_model.model.{n}": t for n, t in original.projector_tensors().items()}
    torch.save(trained, folder / "non_lora_trainables.bin")
    original.write_tower(folder.parent / "the-tower")
    return folder


@torch.no_grad()
def add_lora(original: Original, scaling: float = ALPHA / RANK) -> Original:
    """Add the product of the low-rank matrices to the reference's weights, as the paper says."""
    tensors = make_lora(original)
    for name, module in original.lm.named_modules():
        if name.endswith(TARGETS):
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            module.weight += scaling * b @ a
    return original
