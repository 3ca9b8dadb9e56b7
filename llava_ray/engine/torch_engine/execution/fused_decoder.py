"""The language model's layers as a few large operations, with which the runner computes steps.

A layer of transformers takes some sixty operations, and with few tokens calling them costs more
than computing them. Here the query, key and value projections are one matmul, gate and up another,
and the rotary embedding is one multiplication of complex numbers. Rotary embedding rotates element
i of a head together with element i + E/2; the rows of the query and key weights are interleaved so
that such a pair is adjacent. Queries and keys are permuted alike, so their products do not change.

Only for layers that are built like Llama's; see `can_fuse`.

Shapes: T tokens, W of them wanted, D hidden, H query heads, K kv heads, E head size, I MLP width,
J = 2 I, C = E/2.
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
"""Language models with Llama's layers; biases and sliding windows may differ."""


def can_fuse(language_model: Any) -> bool:
    """Whether `FusedDecoder` computes the same as this language model from transformers."""
    config = language_model.config
    if config.model_type not in MODEL_TYPES:
        return False
    parameters = getattr(config, "rope_parameters", None) or {}
    rotates_all = parameters.get("partial_rotary_factor", 1) in (1, None)
    return rotates_all and all(
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
    """Return one layer that computes the concatenated outputs of several.

    Args:
        interleaved: for each layer the size of the heads to interleave; 0: none.
    """

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
    """Make rows adjacent that are rotated as a pair, which are half a head apart."""
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

        For all other tokens the last layer computes keys and values only. The embeddings are
        overwritten.
        """
        cos_TE, sin_TE = (
            each[0].float()
            for each in self._model.rotary_emb(embeddings_TD, metadata.positions_T[None])
        )
        half = cos_TE.shape[-1] // 2  # the second half repeats the first
        rotations_T1C = torch.complex(cos_TE[:, :half], sin_TE[:, :half])[:, None]
        hidden_TD = embeddings_TD
        *others, last = self._layers
        for layer in others:
            layer.compute(hidden_TD, rotations_T1C, metadata)
        hidden_WD = last.compute(hidden_TD, rotations_T1C, metadata, is_last=True)
        return _rms_norm(hidden_WD, self._model.norm)


class _Layer:
    """One layer, with its modules and sizes looked up in advance."""

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
        """Add the layer's output to the hidden states and return them.

        The last layer returns those of the wanted tokens only.
        """
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
        """Return the attention's output, [T, H * E]; of the last layer [W, H * E]."""
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
        """Return activation(gate) * up, [T, I], of gate and up side by side, [T, 2 I]."""
        if self._has_silu and can_compute(gate_up_TJ):
            return silu_and_mul(gate_up_TJ)
        gate_TI, up_TI = gate_up_TJ.chunk(2, -1)
        return self._activate(gate_TI).mul_(up_TI)


def _rms_norm(hidden_TD: torch.Tensor, norm: Any) -> torch.Tensor:
    if can_compute(hidden_TD):
        return rms_norm(hidden_TD, norm.weight, norm.variance_epsilon)
    return F.rms_norm(hidden_TD, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(heads_TJE: torch.Tensor, rotations_T1C: torch.Tensor, num_rotated: int) -> torch.Tensor:
    """Return the first `num_rotated` heads, each pair of adjacent elements rotated.

    The input may be overwritten.
    """
    rotated_TJE = heads_TJE[:, :num_rotated]
    if can_compute(heads_TJE) and heads_TJE.dtype == torch.bfloat16:
        rotate(heads_TJE, rotations_T1C, num_rotated)
        return rotated_TJE
    pairs = torch.view_as_complex(rotated_TJE.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(rotations_T1C)).flatten(2).to(heads_TJE.dtype)
