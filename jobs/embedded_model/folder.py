"""Writes a trained model as a folder of transformers' LLaVA format.

Tensors have the names of the LLaVA checkpoints on the hub, which every engine reads and which
newer versions of transformers no longer write.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from jobs.embedded_model import language
from jobs.embedded_model.tower import PATCH
from llava_ray.demo import scenes
from llava_ray.model.checkpoint.tensor_names import from_memory

_IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": scenes.PIXELS},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": scenes.PIXELS, "width": scenes.PIXELS},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    "bos_token": language.BOS,
    "eos_token": language.EOS,
    "unk_token": language.UNK,
    "pad_token": language.PAD,
    "image_token": language.IMAGE,
    "extra_special_tokens": {"image_token": language.IMAGE},
    "chat_template": language.CHAT_TEMPLATE,
    "model_max_length": language.CONTEXT,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}
_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": language.IMAGE,
    "patch_size": PATCH,
    "num_additional_image_tokens": 1,  # the class token, which "default" leaves out again
    "vision_feature_select_strategy": "default",
}


TEACHERS = "teachers.pt"
"""The file of the auxiliary heads, kept beside a model so that its training can be continued."""


def write_folder(
    folder: Path,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    teachers: Mapping[str, torch.Tensor],
) -> None:
    """Write weights (bfloat16), configuration, tokenizer, processor and auxiliary heads.

    Each file is replaced atomically; other files in the folder are left unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _write_weights(Path(scratch), model)
        _write_config(Path(scratch), model)
        tokenizer.save_pretrained(scratch)
        torch.save(
            {name: tensor.bfloat16() for name, tensor in teachers.items()},
            Path(scratch) / TEACHERS,
        )
        _write_json(Path(scratch) / "tokenizer_config.json", _TOKENIZER)
        _write_json(Path(scratch) / "preprocessor_config.json", _IMAGE_PROCESSOR)
        _write_json(Path(scratch) / "processor_config.json", _PROCESSOR)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _write_weights(folder: Path, model: LlavaForConditionalGeneration) -> None:
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.bfloat16() if tensor.is_floating_point() else tensor
        tensors[from_memory(name, "hf")] = stored.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_config(folder: Path, model: LlavaForConditionalGeneration) -> None:
    """Write the configuration, with untied embeddings: the file has both matrices."""
    config = model.config.to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    config["dtype"] = config["text_config"]["dtype"] = config["vision_config"]["dtype"] = "bfloat16"
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    config["image_token_index"] = model.config.image_token_id
    _write_json(folder / "config.json", config)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(
        **{token: config["text_config"][token] for token in tokens},
        max_new_tokens=96,
        do_sample=False,
    ).save_pretrained(folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
