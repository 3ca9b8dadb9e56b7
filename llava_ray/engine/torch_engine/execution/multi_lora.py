"""Multi-LoRA: several PEFT adapters on one model, each applied to its own rows of a batch.

`model.lora` merges one adapter into the weights. Here the weights are left unchanged: rows of an
adapter's requests get its low-rank product added, y + scale * B(A x), and their images go through
the adapter's own projector if it has one. One model in memory thus serves itself and all of its
adapters, in one batch.

Shapes: T rows (tokens), I and O a linear layer's inputs and outputs, R an adapter's rank.
"""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from llava_ray.errors import ConfigError, ModelNotFoundError
from llava_ray.model.adapter_files import find_alphas, open_adapter, refuse_base
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.model.checkpoint.weights import StoredTensor, WeightFiles, open_weights
from llava_ray.model.export.projector import PREFIX as PROJECTOR
from llava_ray.model.lora import list_shapes

_REMEDY = "merge it with `llava-ray export`, and serve the result as a model of its own"


class LoraAdapters:
    """The adapters of a model, and which rows of the next computation belong to each.

    Attributes:
        names: names of the adapters.
        rows: adapter -> indices of its rows, [T]; None: all rows. Adapters without rows are absent.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self.rows: dict[str, torch.Tensor | None] = {}

    def check(self, name: str) -> None:
        """Raise a ModelNotFoundError for an unknown adapter; an empty name is the model itself."""
        if name and name not in self.names:
            raise ModelNotFoundError(
                f"the model here has no adapter {name!r}: ask for "
                f"{', '.join(self.names) or 'the model itself'}; during an update, try again",
                param="model",
            )

    def choose(self, rows: Mapping[str, torch.Tensor | None]) -> None:
        """Set which rows belong to which adapter; all others belong to the model itself.

        Args:
            rows: adapter -> indices of its rows, [T]; None: all rows.
        """
        self.rows = {name: rows_T for name, rows_T in rows.items() if name}


class MultiLoraLinear(nn.Module):
    """A linear layer with the low-rank products of adapters.

    Args:
        linear: the layer.
        adapters: tells which rows belong to which adapter.
        products: adapter -> A [I, R] and scale * B [R, O]; only adapters that change this layer.
    """

    def __init__(
        self,
        linear: nn.Module,
        adapters: LoraAdapters,
        products: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        super().__init__()
        self.linear = linear
        self._adapters, self._products = adapters, dict(products)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Convert the products too; they are no buffers, whose names may not contain a dot."""
        super()._apply(fn, recurse)
        self._products = {name: (fn(a), fn(b)) for name, (a, b) in self._products.items()}
        return self

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = self.linear(states)
        for name, rows_T in self._adapters.rows.items():
            if name not in self._products:
                continue
            a_IR, b_RO = self._products[name]
            if rows_T is None:
                output = output + states @ a_IR @ b_RO
                continue
            mine_TI = states.flatten(0, -2)[rows_T]
            output = output.contiguous()
            output.flatten(0, -2).index_add_(0, rows_T, mine_TI @ a_IR @ b_RO)
        return output


class MultiLoraProjector(nn.Module):
    """A model's projector and its adapters' own; each call uses one of them for all rows."""

    def __init__(
        self, projector: nn.Module, adapters: LoraAdapters, own: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.projector, self.own = projector, nn.ModuleList(own.values())
        self._adapters, self._names = adapters, list(own)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for name in self._adapters.rows:
            if name in self._names:
                return self.own[self._names.index(name)](features)
        return self.projector(features)


class _Adapter(NamedTuple):
    """What an adapter's folder holds, by the names of modules in memory."""

    products: dict[str, tuple[torch.Tensor, torch.Tensor]]
    projector: dict[str, torch.Tensor]


def load_lora_adapters(model: Any, folders: Mapping[str, str]) -> LoraAdapters:
    """Add adapters to a model in place; without chosen rows it computes as before.

    Args:
        model: from transformers or from `modeling`, before its weights are packed.
        folders: adapter -> folder, hub name or address.

    Raises:
        ConfigError: an adapter is not a LoRA, is damaged, was made for another base, changes
            nothing, or changes something that all rows share.
    """
    adapters = LoraAdapters(tuple(folders))
    loaded = {name: _read(model, find_folder(path)) for name, path in folders.items()}
    projector = model.model.multi_modal_projector
    own = {
        name: _build_projector(projector, each.projector)
        for name, each in loaded.items()
        if each.projector
    }
    for place in sorted({place for each in loaded.values() for place in each.products}):
        products = {n: each.products[place] for n, each in loaded.items() if place in each.products}
        model.set_submodule(place, MultiLoraLinear(model.get_submodule(place), adapters, products))
    if own:
        model.model.multi_modal_projector = MultiLoraProjector(projector, adapters, own)
    return adapters


def _read(model: Any, folder: Path) -> _Adapter:
    settings, lora, whole = open_adapter(
        folder, list_shapes(model), is_tied=model.config.get_text_config().tie_word_embeddings
    )
    extra = folder / "non_lora_trainables.bin"
    if extra.is_file():
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        for place, tensor in open_weights((WeightFiles((extra,)),)).items():
            if shapes.get(place) != tensor.shape:
                raise refuse_base(folder, place, tensor, settings)
            whole[place] = tensor
    _check(model, folder, lora, whole)
    targets = sorted({name.rpartition(".lora_")[0] for name in lora})
    alphas = find_alphas(settings, targets)
    like = {"dtype": model.dtype, "device": model.device}
    products = {}
    for target in targets:
        a_IR = lora[f"{target}.lora_A.weight"][...].float().T
        b_RO = lora[f"{target}.lora_B.weight"][...].float().T
        rank = len(b_RO)
        alpha = alphas.get(target, float(settings.get("lora_alpha", 8)))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        products[target] = (a_IR.to(**like).contiguous(), (scale * b_RO).to(**like).contiguous())
    if not whole and not any(b_RO.any() for _, b_RO in products.values()):
        raise ConfigError(
            f"the adapter in {folder} changes no logits because its weights are all zero: "
            "train it, or leave it out"
        )
    projector = {n.removeprefix(PROJECTOR): tensor[...].to(**like) for n, tensor in whole.items()}
    return _Adapter(products, projector)


def _check(
    model: Any, folder: Path, lora: Mapping[str, StoredTensor], whole: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors other than A and B of a linear layer, or a projector's."""
    for name in lora:
        place, _, kind = name.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise ConfigError(
                f"the adapter in {folder} is not a plain LoRA ({name}), and only plain LoRAs can "
                f"be served beside a model: {_REMEDY}"
            )
        if place == "lm_head" or not isinstance(model.get_submodule(place), nn.Linear):
            raise _refuse(folder, place)
    for place in whole:
        if not place.startswith(PROJECTOR):
            raise _refuse(folder, place)


def _refuse(folder: Path, place: str) -> ConfigError:
    return ConfigError(
        f"the adapter in {folder} changes {place}, which all requests of a batch share: {_REMEDY}"
    )


def _build_projector(projector: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    own = copy.deepcopy(projector)
    own.load_state_dict(own.state_dict() | dict(tensors))
    return own
