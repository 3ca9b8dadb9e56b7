"""The language model's layers in few, large operations: what the runner computes steps with.

transformers' own layers take some sixty operations each, and while few tokens are computed, calling
them costs more than computing them. Here query, key and value are one product, gate and up another,
and the rotation of queries and keys is one multiplication of complex numbers: for that, the two
halves of a head, whose numbers are rotated in pairs, are interleaved in the weights. Queries and
keys are interleaved alike, so that their products stay what they are.

Only for layers that are built like Llama's; `can_fuse` says which are.

Shapes: T tokens, W of them wanted, D hidden, H query heads, K kv heads, E head size, I width of the
MLP.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_ray.engine.torch_engine.execution.attention_metadata import AttentionMetadata
from llava_ray.engine.torch_engine.execution.cpu_layers import (
    can_compute,
    rms_norm,
    rotate,
    silu_and_mul,
)

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""Language models whose layers are built so, apart from biases and sliding windows."""


def can_fuse(language_model: Any) -> bool:
    """Whether `FusedDecoder` computes what this language model of transformers does."""
    config = language_model.config
    if config.model_type not in MODEL_TYPES:
        return False
    parameters = getattr(config, "rope_parameters", None) or {}
    turns_all = parameters.get("partial_rotary_factor", 1) in (1, None)
    return turns_all and all(
        type(linear) is nn.Linear
        for layer in language_model.layers
        for linear in [*_get_qkv(layer), *_get_gate_up(layer)]
    )


def fuse(language_model: Any) -> None:
    """Join the weights of products that have the same input; the model itself computes no more.

    One layer at a time: at most one layer's weights are in memory twice. On a GPU the freed ones
    lie between others. torch's allocator gives such memory back only from expandable segments,
    which `engine.factory` turns on; without them a 7B model leaves several GB of holes.
    """
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = _get_qkv(layer)
        size = attention.head_dim
        attention.qkv_proj = _join([query, key, value], interleaved=[size, size, 0])
        mlp.gate_up_proj = _join(_get_gate_up(layer), interleaved=[0, 0])
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj


def _get_qkv(layer: Any) -> list[nn.Linear]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _get_gate_up(layer: Any) -> list[nn.Linear]:
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def _join(linears: Sequence[nn.Linear], interleaved: Sequence[int]) -> nn.Linear:
    """Return one layer for several, the heads of the given sizes interleaved; 0: as they are."""

    def join(name: str) -> nn.Parameter:
        each = [
            _interleave(getattr(linear, name), size)
            for linear, size in zip(linears, interleaved, strict=True)
        ]
        return nn.Parameter(torch.cat(each), requires_grad=False)

    joined = nn.Linear(1, 1, bias=False, device="meta")
    joined.weight = join("weight")
    joined.out_features, joined.in_features = joined.weight.shape
    if linears[0].bias is not None:
        joined.bias = join("bias")
    return joined


def _interleave(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """Bring the numbers that are rotated as a pair, half a head apart, side by side."""
    weight = weight.detach()
    if not head_size:
        return weight
    pairs = weight.unflatten(0, (-1, 2, head_size // 2))
    return pairs.transpose(1, 2).flatten(0, 2)


class FusedDecoder:
    """Computes all layers of a language model whose weights are fused.

    Args:
        language_model: from transformers, after `fuse`; packed or not.
    """

    def __init__(self, language_model: Any) -> None:
        self._model = language_model
        self._layers = [_Layer(layer, language_model.config) for layer in language_model.layers]

    def __call__(self, embeddings_TD: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Return the last hidden states of the wanted tokens, [W, D].

        The last layer computes only keys and values of the others. Embeddings are overwritten.
        """
        cos_TE, sin_TE = (
            each[0].float()
            for each in self._model.rotary_emb(embeddings_TD, metadata.positions_T[None])
        )
        half = cos_TE.shape[-1] // 2  # the other one is the same
        rotations_T1C = torch.complex(cos_TE[:, :half], sin_TE[:, :half])[:, None]
        hidden_TD = embeddings_TD
        *others, last = self._layers
        for layer in others:
            layer.compute(hidden_TD, rotations_T1C, metadata)
        hidden_WD = last.compute(hidden_TD, rotations_T1C, metadata, is_last=True)
        return _rms_norm(hidden_WD, self._model.norm)


class _Layer:
    """One layer: what of it is needed, at hand."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index = int(attention.layer_idx)
        self._size = attention.head_dim
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._scaling = attention.scaling
        own = attention if hasattr(attention, "sliding_window") else config
        self._window = getattr(own, "sliding_window", None)
        self._norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv, self._output = attention.qkv_proj, attention.o_proj
        self._gate_up, self._down, self._activate = mlp.gate_up_proj, mlp.down_proj, mlp.act_fn
        self._has_silu = config.hidden_act == "silu"

    def compute(
        self,
        hidden_TD: torch.Tensor,
        rotations_T1C: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        is_last: bool = False,
    ) -> torch.Tensor:
        """Add to the hidden states what this layer adds; return them, if it is last the wanted."""
        heads_TX = self._qkv(_rms_norm(hidden_TD, self._norm))
        if metadata.rotate_and_attend and can_compute(heads_TX):
            output_TX = metadata.rotate_and_attend(
                self._index, heads_TX, rotations_T1C, scaling=self._scaling, window=self._window
            )
        else:
            output_TX = self._attend(heads_TX, rotations_T1C, metadata, is_last=is_last)
            if is_last and metadata.wanted is not None:
                hidden_TD = hidden_TD[metadata.wanted]
        if not len(hidden_TD):
            return hidden_TD
        hidden_TD += self._output(output_TX)
        gate_up_TJ = self._gate_up(_rms_norm(hidden_TD, self._mlp_norm))
        hidden_TD += self._down(self._let_through(gate_up_TJ))
        return hidden_TD

    def _attend(
        self,
        heads_TX: torch.Tensor,
        rotations_T1C: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        is_last: bool,
    ) -> torch.Tensor:
        """Return what the tokens see, [T, H * E], of the last layer the wanted ones."""
        heads_TJE = heads_TX.unflatten(-1, (-1, self._size))
        num_rotated = self._num_heads + self._num_kv_heads
        rotated_TJE = _rotate(heads_TJE, rotations_T1C, num_rotated)
        query_THE = rotated_TJE[:, : self._num_heads]
        if is_last and metadata.wanted is not None:
            query_THE = query_THE[metadata.wanted]
        return metadata.attend(
            self._index,
            query_THE,
            rotated_TJE[:, self._num_heads :],
            heads_TJE[:, num_rotated:],
            scaling=self._scaling,
            window=self._window,
            is_last=is_last,
        ).flatten(1)

    def _let_through(self, gate_up_TJ: torch.Tensor) -> torch.Tensor:
        """Return the activated gates times what they let through, [T, I], of [T, 2 I]."""
        if self._has_silu and can_compute(gate_up_TJ):
            return silu_and_mul(gate_up_TJ)
        gate_TI, up_TI = gate_up_TJ.chunk(2, -1)
        return self._activate(gate_TI).mul_(up_TI)


def _rms_norm(hidden_TD: torch.Tensor, norm: Any) -> torch.Tensor:
    if can_compute(hidden_TD):
        return rms_norm(hidden_TD, norm.weight, norm.variance_epsilon)
    return F.rms_norm(hidden_TD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(heads_TJE: torch.Tensor, rotations_T1C: torch.Tensor, num_rotated: int) -> torch.Tensor:
    """Return the first heads, each pair of neighbours rotated by its token's angle.

    What it is given may be overwritten.
    """
    rotated_TJE = heads_TJE[:, :num_rotated]
    if can_compute(heads_TJE) and heads_TJE.dtype == torch.bfloat16:
        rotate(heads_TJE, rotations_T1C, num_rotated)
        return rotated_TJE
    pairs = torch.view_as_complex(rotated_TJE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(rotations_T1C)).flatten(2).to(heads_TJE.dtype)
