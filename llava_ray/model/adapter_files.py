"""Reads a PEFT adapter's folder and checks it against the model that it belongs to.

Names and shapes only, but for one look at the values: `doctor`, loading (`lora`) and the engine
(`multi_lora`) refuse the same adapters with the same words. LLaVA's own adapters name modules as
LLaVA does, others as the version of transformers that they were trained with; `tensor_names`
translates both.

File formats: peft's adapter_config.json and adapter_model.safetensors (or .bin).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import ADAPTER_FILES
from llava_ray.model.checkpoint.locate import REMEDY, read_json
from llava_ray.model.checkpoint.tensor_names import CheckpointFormat, detect_format, to_memory
from llava_ray.model.checkpoint.weights import StoredTensor, open_file

Shapes = Mapping[str, tuple[int, ...]]

_PREFIX = re.compile(r"^(base_model\.model\.|base_model\.)")
_LORA = re.compile(
    r"(.+)\.(lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))(?:\.default)?(?:\.(weight|bias))?"
)
_WHOLE = re.compile(r"\.(modules_to_save(\.default)?|base_layer|original_module)(?=\.|$)")
_EMBEDDINGS = re.compile(r"model\.language_model\.(embed_tokens|wte|embed_in)\.weight")
_HEAD = "lm_head.weight"
_UNSUPPORTED = {
    "trainable_token_indices": "rows of the embeddings that were trained by themselves",
    "layer_replication": "layers that are used several times",
    "use_bdlora": "block-diagonal matrices",
}


class Adapter(NamedTuple):
    """An adapter's configuration and tensors, by their names in memory.

    Attributes:
        settings: adapter_config.json.
        lora: low-rank tensors: `<module>.lora_A.weight`, `.lora_B.weight`, `.lora_B.bias`, ...
        whole: tensors that replace the model's; embeddings may have more rows than those.
    """

    settings: dict[str, Any]
    lora: dict[str, StoredTensor]
    whole: dict[str, StoredTensor]

    @property
    def targets(self) -> list[str]:
        """The names of the modules that have low-rank tensors."""
        return sorted({name.rpartition(".lora_")[0] for name in self.lora})

    @property
    def num_rows(self) -> int | None:
        """How many rows the embeddings have with it, if it brings them."""
        return next((t.shape[0] for n, t in self.whole.items() if _EMBEDDINGS.fullmatch(n)), None)


def open_adapter(folder: Path, shapes: Shapes, *, is_tied: bool = False) -> Adapter:
    """Return what a folder holds, checked against a model.

    Args:
        folder: holds adapter_config.json and the adapter's weights.
        shapes: the shapes of the model's tensors, by their names in memory.
        is_tied: whether the model computes its head from the embeddings.

    Raises:
        ConfigError: it is not a LoRA, is damaged or incomplete, uses what is not supported, or was
            trained on another model.
    """
    settings = _read_settings(folder)
    adapter = Adapter(settings, {}, {})
    tensors = _read_tensors(folder)
    file_format = detect_format(tensors)
    for name, tensor in tensors.items():
        _check_gathered(folder, name, tensor)
        if match := _LORA.fullmatch(name):
            place = find_place(match[1], file_format)
            weight = shapes.get(f"{place}.weight")
            if weight is None or not _fits(tensor.shape, match[2], match[3], weight):
                raise refuse_base(folder, name, tensor, settings)
            is_matrix = match[2] in ("lora_A", "lora_B")
            ending = f".{match[3] or 'weight'}" if is_matrix else ""
            adapter.lora[f"{place}.{match[2]}{ending}"] = tensor
        else:
            place = to_memory(_WHOLE.sub("", name), file_format)
            if place is None or not _replaces(place, tensor.shape, shapes):
                raise refuse_base(folder, name, tensor, settings)
            adapter.whole[place] = tensor
    _check_pairs(folder, adapter)
    _check_biases(folder, adapter, shapes)
    _check_rows(folder, adapter, shapes, is_tied=is_tied)
    return adapter


def find_place(name: str, file_format: CheckpointFormat) -> str | None:
    """Return the name in memory of a module as an adapter's file names it."""
    place = to_memory(f"{name}.weight", file_format)
    return place.removesuffix(".weight") if place else None


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


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"{file}: peft_type {settings.get('peft_type')!r} adapters are not supported: use LoRA "
            "(DoRA and rank-stabilised LoRA included), or merge it with peft's merge_and_unload"
        )
    for field, what in _UNSUPPORTED.items():
        if settings.get(field):
            raise ConfigError(
                f"{file}: {field} is set, and {what} are not supported: merge the adapter with "
                "peft's merge_and_unload, and give the folder of the whole model"
            )
    return settings


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's tensors by their names in the file, without peft's prefix."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            if tensors := open_file(folder / name):
                return {_PREFIX.sub("", n): t for n, t in tensors.items()}
            raise ConfigError(f"the adapter in {folder} holds no tensors: {REMEDY}")
    raise ConfigError(
        f"{folder} lacks the adapter's weights ({' or '.join(ADAPTER_FILES)}): {REMEDY}"
    )


def _check_gathered(folder: Path, name: str, tensor: StoredTensor) -> None:
    if tensor.num_elements == 0:
        raise ConfigError(
            f"the adapter in {folder} has no values for {name!r} {list(tensor.shape)}: it was "
            "saved under ZeRO 3 without gathering its weights; save it again with "
            "stage3_gather_16bit_weights_on_model_save, or convert the checkpoint with "
            "DeepSpeed's zero_to_fp32.py"
        )


def _fits(shape: tuple[int, ...], kind: str, part: str | None, weight: tuple[int, ...]) -> bool:
    """Return whether a low-rank tensor's shape fits its module's weight [outputs, inputs, ...]."""
    if part == "bias":
        return shape == weight[:1]
    match kind:
        case "lora_A":
            return len(shape) > 1 and shape[1:2] == weight[1:2]
        case "lora_B":
            return len(shape) > 1 and shape[0] == weight[0]
        case "lora_embedding_A":
            return len(shape) == 2 and shape[1] == weight[0]
        case "lora_embedding_B":
            return len(shape) == 2 and shape[0] == weight[1]
    return weight[0] in shape  # the magnitudes of DoRA


def _replaces(place: str, shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Return whether a tensor may take the place of the model's: embeddings may have grown."""
    if (own := shapes.get(place)) is None:
        return False
    if own == shape:
        return True
    may_grow = place == _HEAD or _EMBEDDINGS.fullmatch(place)
    return bool(may_grow) and len(shape) == 2 and shape[1] == own[1] and shape[0] > own[0]


def _check_pairs(folder: Path, adapter: Adapter) -> None:
    """Check that no module has one of the two matrices without the other."""
    for first, second in (
        ("lora_A.weight", "lora_B.weight"),
        ("lora_embedding_A", "lora_embedding_B"),
    ):
        for one, other in ((first, second), (second, first)):
            modules = [n.removesuffix(f".{one}") for n in adapter.lora if n.endswith(f".{one}")]
            alone = [module for module in modules if f"{module}.{other}" not in adapter.lora]
            if alone:
                raise ConfigError(
                    f"the adapter in {folder} has {one.removesuffix('.weight')} without "
                    f"{other.removesuffix('.weight')} for {len(alone)} modules ({alone[0]}): it is "
                    f"incomplete; {REMEDY}"
                )


def _check_biases(folder: Path, adapter: Adapter, shapes: Shapes) -> None:
    for name in adapter.lora:
        place = name.removesuffix(".lora_B.bias")
        if place != name and f"{place}.bias" not in shapes:
            raise ConfigError(
                f"the adapter in {folder} has biases (lora_bias) for {place}, which has none in "
                "the base, so that the two cannot be merged: train it without lora_bias"
            )


def _check_rows(folder: Path, adapter: Adapter, shapes: Shapes, *, is_tied: bool) -> None:
    """Check that embeddings and head have grown together."""
    rows = {
        place: tensor.shape[0]
        for place, tensor in adapter.whole.items()
        if place == _HEAD or _EMBEDDINGS.fullmatch(place)
    }
    embeddings = next(place for place in shapes if _EMBEDDINGS.fullmatch(place))
    all_rows = {place: rows.get(place, shapes[place][0]) for place in (embeddings, _HEAD)}
    if is_tied and len(rows) < 2:
        return
    if len(set(all_rows.values())) > 1:
        raise ConfigError(
            f"the adapter in {folder} leaves {all_rows[embeddings]:,} rows of embeddings and "
            f"{all_rows[_HEAD]:,} of lm_head: the vocabulary was grown, and only one of them was "
            "saved; save both (peft's save_embedding_layers=True)"
        )


def check_effect(folder: Path, adapter: Adapter) -> None:
    """Raise a ConfigError if an adapter changes nothing; reads a few of its tensors."""
    products = [t for n, t in adapter.lora.items() if "lora_B" in n or "embedding_A" in n]
    if not adapter.whole and not any(bool(tensor[...].any()) for tensor in products):
        raise ConfigError(
            f"the adapter in {folder} changes no logits: its weights are all zero, or were saved "
            "before training began; train it, or load its base alone"
        )
