"""Subclasses of transformers' Llava classes, for checkpoints that those cannot express.

`architecture` chooses the class. transformers' own classes are used wherever they compute the same;
only the differences are here:

    projectors of one, three or more linear layers, or none
    anyres tiles joined flat, or on a grid with or without the cropping of padding (LLaVA's
    `mm_patch_merge_type`), with LLaVA's own rounding
    a newline behind each image that has no tiles, as in LLaVA-NeXT's code
    an image token outside the vocabulary, so that checkpoints of LLaVA's format keep their sizes
    language models whose embeddings are named differently (MPT)

Shapes: N images, T tiles of an image (the first is the whole image), P patches of a tile,
D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    LlavaNextPreTrainedModel,
)

from llava_ray.model.anyres import join_tiles
from llava_ray.model.checkpoint.tensor_names import count_projector_layers

EMBEDDINGS = {"mpt": "wte", "gpt_neox": "embed_in"}
"""Names of the token embeddings where they are not `embed_tokens`."""


class Projector(nn.Module):
    """`linear_1`, GELU, `linear_2`, ...: any number of linear layers, zero included."""

    def __init__(self, in_size: int, out_size: int, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        for i in range(num_layers):
            setattr(self, f"linear_{i + 1}", nn.Linear(out_size if i else in_size, out_size))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        for i in range(self.num_layers):
            if i:
                image_features = nn.functional.gelu(image_features)
            image_features = getattr(self, f"linear_{i + 1}")(image_features)
        return image_features


class Llava(LlavaForConditionalGeneration):
    """LLaVA with one tile for each image.

    `config` has `mm_projector_type` in addition to `LlavaConfig`'s fields.
    """

    def __init__(self, config: Any) -> None:
        self._tied_weights_keys = _tie(config)
        super().__init__(config)
        _adapt(self, config)


class NewlineModel(LlavaModel):
    """LLaVA's trunk, with a learned vector behind the patches of each image."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))

    def get_image_features(  # type: ignore[override]
        self, pixel_values: Any, **kwargs: Any
    ) -> Any:
        """Return transformers' output, whose N features are [P + 1, D].

        Args:
            pixel_values: [N, C, H, W]; transformers' `generate` looks for an argument of this name.
            kwargs: those of `LlavaModel`.
        """
        output: Any = super().get_image_features(pixel_values, **kwargs)
        output.pooler_output = [
            torch.cat([features_PD, self.image_newline[None].to(features_PD)])
            for features_PD in output.pooler_output
        ]
        return output


class LlavaNewline(LlavaForConditionalGeneration):
    """LLaVA with one tile and a newline for each image.

    `config` has `mm_projector_type` in addition to `LlavaConfig`'s fields.
    """

    def __init__(self, config: Any) -> None:
        self._tied_weights_keys = _tie(config)
        LlavaPreTrainedModel.__init__(self, config)
        self.model = NewlineModel(config)
        self.lm_head = _make_head(config)
        self.post_init()
        _adapt(self, config)


class AnyresModel(LlavaNextModel):
    """LLaVA-NeXT's trunk, joining tiles as `config.mm_patch_merge_type` says."""

    def pack_image_features(
        self,
        image_features: Sequence[torch.Tensor],
        image_sizes: Any,
        vision_feature_select_strategy: str,
        image_newline: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return each image's features, [tokens, D], and the numbers of tokens.

        Args:
            image_features: of each image, [T, P, D].
            image_sizes: [N, 2], height and width of the original images.
            vision_feature_select_strategy: already applied; not used.
            image_newline: [D], put after each row of the grid if the merge type has "unpad".
        """
        config: Any = self.config
        packed = [
            join_tiles(
                features_TPD,
                (int(height), int(width)),
                pinpoints=config.image_grid_pinpoints,
                tile_size=config.vision_config.image_size,
                merge_type=config.mm_patch_merge_type,
                newline_D=image_newline,
            )
            for features_TPD, (height, width) in zip(image_features, image_sizes, strict=True)
        ]
        counts = torch.tensor([len(features) for features in packed], device=packed[0].device)
        return packed, counts


class LlavaAnyres(LlavaNextForConditionalGeneration):
    """LLaVA with images laid out in tiles.

    `config` has `mm_projector_type` and `mm_patch_merge_type` in addition to `LlavaNextConfig`'s
    fields.
    """

    def __init__(self, config: Any) -> None:
        self._tied_weights_keys = _tie(config)
        LlavaNextPreTrainedModel.__init__(self, config)
        self.model = AnyresModel(config)
        self.lm_head = _make_head(config)
        if "unpad" not in config.mm_patch_merge_type:
            self.model.image_newline = None  # type: ignore[assignment]
        self.post_init()
        _adapt(self, config)


def _make_head(config: Any) -> nn.Linear:
    return nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)


def _tie(config: Any) -> dict[str, str]:
    name = EMBEDDINGS.get(config.text_config.model_type, "embed_tokens")
    return {"lm_head.weight": f"model.language_model.{name}.weight"}


def _adapt(model: Any, config: Any) -> None:
    """Give a new model the projector of its type, and make its image token safe to look up."""
    projector = getattr(config, "mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        model.model.multi_modal_projector = Projector(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            count_projector_layers(projector),
        )
    embeddings = model.get_input_embeddings()
    if config.image_token_id >= embeddings.num_embeddings:
        embeddings.register_forward_pre_hook(_keep_in_vocabulary)


def _keep_in_vocabulary(embeddings: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
    """Clamp the image token's id, which has no row; image features replace its embedding anyway."""
    ids, *rest = args
    last = embeddings.num_embeddings - 1  # type: ignore[operator]
    return (ids.clamp(max=last), *rest)
