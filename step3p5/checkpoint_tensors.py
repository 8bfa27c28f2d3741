"""The tensors of a Step-3.5 checkpoint: every hub name with its shape and role, from the parsed configuration alone.

One table serves whoever must agree on what a checkpoint holds: the loader's check for missing, extra and misshapen
tensors, byte counting, and `step3p5.random_checkpoint`. The names and shapes are those of the unquantised
`stepfun-ai/Step-3.5-Flash` checkpoint; all routed experts of a layer are stacked in one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from step3p5.layer_config import AttentionConfig, DenseMLPConfig, LayerConfig, ModelConfig, MoEConfig


class CheckpointDtype(StrEnum):
    """A floating-point type that an unquantised checkpoint can store, spelled as in `torch_dtype`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is CheckpointDtype.FLOAT32 else 2


class TensorRole(StrEnum):
    """What a tensor does in the forward pass; the shared expert and the dense MLP play the same three `mlp_*` roles."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    HIDDEN_NORM = "hidden_norm"
    QK_NORM = "qk_norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_GATE = "attention_gate"
    ATTENTION_OUTPUT = "attention_output"
    MLP_GATE = "mlp_gate"
    MLP_UP = "mlp_up"
    MLP_DOWN = "mlp_down"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    MTP_PROJECTION = "mtp_projection"


FLOAT32_ROLES = frozenset({TensorRole.ROUTER_BIAS})
"""Roles stored in float32 whatever the dtype of the rest of the checkpoint."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape (row-major, outermost first) and role of one stored tensor."""

    shape: tuple[int, ...]
    role: TensorRole

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    def dtype(self, checkpoint_dtype: CheckpointDtype) -> CheckpointDtype:
        """The dtype in which a checkpoint of `checkpoint_dtype` stores this tensor."""
        return CheckpointDtype.FLOAT32 if self.role in FLOAT32_ROLES else checkpoint_dtype

    def num_bytes(self, checkpoint_dtype: CheckpointDtype) -> int:
        """Bytes that this tensor takes in a checkpoint of `checkpoint_dtype`."""
        return self.num_elements * self.dtype(checkpoint_dtype).itemsize


def checkpoint_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """The decoder's tensors by hub name, in forward order: embedding, layers, final norm, head.

    A tied head (`tie_word_embeddings`) has no tensor of its own. The MTP tail is `mtp_tensors`.
    """
    hidden, vocab = model.hidden_size, model.vocab_size
    tensors = {"model.embed_tokens.weight": TensorSpec((vocab, hidden), TensorRole.EMBEDDING)}
    for layer in model.layers:
        tensors |= _named(layer, _layer_tensors(hidden, layer))
    tensors["model.norm.weight"] = TensorSpec((hidden,), TensorRole.HIDDEN_NORM)
    if not model.tie_word_embeddings:
        tensors["lm_head.weight"] = TensorSpec((vocab, hidden), TensorRole.LM_HEAD)
    return tensors


def mtp_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """The multi-token-prediction layers' tensors by hub name, in forward order.

    Each depth has its own output head; the embedding is the decoder's and is not repeated.
    """
    tensors: dict[str, TensorSpec] = {}
    for layer in model.mtp_layers:
        tensors |= mtp_layer_tensors(model, layer)
    return tensors


def mtp_layer_tensors(model: ModelConfig, layer: LayerConfig) -> dict[str, TensorSpec]:
    """The tensors of one multi-token-prediction layer by hub name, in forward order."""
    hidden, vocab = model.hidden_size, model.vocab_size
    before = {
        "enorm.weight": TensorSpec((hidden,), TensorRole.HIDDEN_NORM),
        "hnorm.weight": TensorSpec((hidden,), TensorRole.HIDDEN_NORM),
        "eh_proj.weight": TensorSpec((hidden, 2 * hidden), TensorRole.MTP_PROJECTION),
    }
    after = {
        "transformer.shared_head.norm.weight": TensorSpec((hidden,), TensorRole.HIDDEN_NORM),
        "transformer.shared_head.output.weight": TensorSpec((vocab, hidden), TensorRole.LM_HEAD),
    }
    return _named(layer, before | _layer_tensors(hidden, layer) | after)


def _named(layer: LayerConfig, tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {f"model.layers.{layer.index}.{name}": spec for name, spec in tensors.items()}


def _layer_tensors(hidden: int, layer: LayerConfig) -> dict[str, TensorSpec]:
    mlp = layer.mlp
    return {
        "input_layernorm.weight": TensorSpec((hidden,), TensorRole.HIDDEN_NORM),
        **_attention_tensors(hidden, layer.attention),
        "post_attention_layernorm.weight": TensorSpec((hidden,), TensorRole.HIDDEN_NORM),
        **(_moe_tensors(hidden, mlp) if isinstance(mlp, MoEConfig) else _mlp_tensors("mlp", hidden, mlp)),
    }


def _attention_tensors(hidden: int, attention: AttentionConfig) -> dict[str, TensorSpec]:
    heads, head_dim = attention.num_attention_heads, attention.head_dim
    query, key_value = heads * head_dim, attention.num_key_value_heads * head_dim
    tensors = {
        "self_attn.q_proj.weight": TensorSpec((query, hidden), TensorRole.QUERY),
        "self_attn.k_proj.weight": TensorSpec((key_value, hidden), TensorRole.KEY),
        "self_attn.v_proj.weight": TensorSpec((key_value, hidden), TensorRole.VALUE),
    }
    if attention.qk_norm:
        tensors["self_attn.q_norm.weight"] = TensorSpec((head_dim,), TensorRole.QK_NORM)
        tensors["self_attn.k_norm.weight"] = TensorSpec((head_dim,), TensorRole.QK_NORM)
    if attention.head_wise_gate:
        tensors["self_attn.g_proj.weight"] = TensorSpec((heads, hidden), TensorRole.ATTENTION_GATE)
    tensors["self_attn.o_proj.weight"] = TensorSpec((hidden, query), TensorRole.ATTENTION_OUTPUT)
    return tensors


def _mlp_tensors(prefix: str, hidden: int, mlp: DenseMLPConfig) -> dict[str, TensorSpec]:
    width = mlp.intermediate_size
    return {
        f"{prefix}.gate_proj.weight": TensorSpec((width, hidden), TensorRole.MLP_GATE),
        f"{prefix}.up_proj.weight": TensorSpec((width, hidden), TensorRole.MLP_UP),
        f"{prefix}.down_proj.weight": TensorSpec((hidden, width), TensorRole.MLP_DOWN),
    }


def _moe_tensors(hidden: int, moe: MoEConfig) -> dict[str, TensorSpec]:
    experts, width = moe.num_experts, moe.intermediate_size
    tensors = {"moe.gate.weight": TensorSpec((experts, hidden), TensorRole.ROUTER)}
    if moe.router_bias:
        tensors["moe.router_bias"] = TensorSpec((experts,), TensorRole.ROUTER_BIAS)
    tensors["moe.gate_proj.weight"] = TensorSpec((experts, width, hidden), TensorRole.EXPERT_GATE)
    tensors["moe.up_proj.weight"] = TensorSpec((experts, width, hidden), TensorRole.EXPERT_UP)
    tensors["moe.down_proj.weight"] = TensorSpec((experts, hidden, width), TensorRole.EXPERT_DOWN)
    return tensors | _mlp_tensors("share_expert", hidden, moe.shared_expert)
