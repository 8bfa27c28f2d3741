"""The whole Step-3.5 model in numpy float64, as plain equations: the truth that the package is measured against.

It imports nothing but numpy, reads a raw hub `config.json` and hub tensor names, and runs the full sequence at once
(no KV cache). Shapes: T tokens, H hidden size, N query heads, G key-value heads, D head dim, E experts, K chosen
experts, M expert width, V vocabulary. Every function accepts any float dtype and computes in float64.

Readings of `config.json` chosen here where releases differ:
- a flag that is absent has its released value, true (`tie_word_embeddings`: false);
- a `null` entry of a per-layer list is 0: no clamp, no RoPE, nothing rotated;
- a list may be empty (as if absent) or longer than the model, never shorter than the highest layer that is run;
- `moe_layers_enum` present but empty means no MoE layer; layers of the MTP tail are dense whatever it says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def float64(x: Array) -> Float64:
    """`x` as float64."""
    return np.asarray(x, dtype=np.float64)


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 1.0) -> Float64:
    """RMSNorm over the last axis; `offset` is 1 for zero-centred weights, 0 for plain ones. Shape of `x`."""
    x = float64(x)
    mean_square: Float64 = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * (offset + float64(weight))


def sigmoid(x: Array) -> Float64:
    """The logistic function, exact in relative terms also for very negative `x`."""
    return np.exp(-np.logaddexp(0.0, -float64(x)))


def swiglu(gate: Array, up: Array, limit: float | None = None) -> Float64:
    """`silu(gate) * up`; with a limit L, `min(silu(gate), L) * clamp(up, -L, L)`. Shape of `gate`."""
    gate, up = float64(gate), float64(up)
    activated = gate * sigmoid(gate)
    if limit is None:
        return activated * up
    return np.minimum(activated, limit) * np.clip(up, -limit, limit)


def mlp(x: Array, gate_proj: Array, up_proj: Array, down_proj: Array, limit: float | None = None) -> Float64:
    """A gated MLP: x [T, H], gate_proj and up_proj [M, H], down_proj [H, M] -> [T, H]."""
    x = float64(x)
    return swiglu(x @ float64(gate_proj).T, x @ float64(up_proj).T, limit) @ float64(down_proj).T


def rope_frequencies(theta: float, rotary_dim: int, scaling: Mapping[str, Any] | None = None) -> Float64:
    """Radians per position of each rotated pair, [rotary_dim / 2]; `scaling` is a `rope_scaling` object (llama3)."""
    if rotary_dim % 2 or (rotary_dim and theta <= 0.0):
        raise ValueError(f"rope: found theta {theta} and rotary_dim {rotary_dim}, expected theta > 0 and an even dim")
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / max(rotary_dim, 1)
    frequencies: Float64 = float(theta) ** -exponents
    if scaling is None or scaling["rope_type"] == "default":
        return frequencies
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_scaling.rope_type: found {scaling['rope_type']!r}, expected 'llama3'")
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2.0 * math.pi)
    keep: Float64 = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / float(scaling["factor"])


def apply_rope(x: Array, positions: Array, frequencies: Float64) -> Float64:
    """Rotate dim i with dim i + R/2 by `position * frequencies[i]`, R = 2 * len(frequencies); dims from R on pass.

    x [T, heads, D], positions [T], frequencies [R/2] -> [T, heads, D].
    """
    x, half = float64(x), len(frequencies)
    angles = (float64(positions)[:, None] * frequencies)[:, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(q: Array, k: Array, v: Array, sliding_window: int | None = None) -> Float64:
    """Causal grouped-query softmax attention with scale `D ** -0.5`, before any gate.

    q [Tq, N, D], k and v [Tk, G, D] -> [Tq, N, D]. The queries are the last Tq of the Tk positions; query head n reads
    key-value head `n // (N // G)`; with a window, a query sees itself and the `sliding_window - 1` keys before it.
    """
    q, k, v = float64(q), float64(k), float64(v)
    query_count, heads, head_dim = q.shape
    key_count, kv_heads, _ = k.shape
    distance = np.arange(key_count - query_count, key_count)[:, None] - np.arange(key_count)[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    out = np.empty_like(q)
    for kv_head, group in enumerate(np.split(np.arange(heads), kv_heads)):
        scores = q[:, group].transpose(1, 0, 2) @ k[:, kv_head].T * head_dim**-0.5
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, group] = (weights @ v[:, kv_head]).transpose(1, 0, 2)
    return out


def route(logits: Array, bias: Array | None, top_k: int, normalize: bool, scale: float) -> tuple[Int64, Float64]:
    """Choose the `top_k` experts of `sigmoid(logits) + bias`, weighed by `sigmoid(logits)` alone.

    logits [T, E], bias [E] or None -> ids int64 [T, K] by falling score (ties: lower id first), weights [T, K].
    """
    scores = sigmoid(logits)
    choice = scores if bias is None else scores + float64(bias)
    ids = np.argsort(-choice, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return ids, weights * scale


def router_margin(logits: Array, bias: Array | None, top_k: int) -> float:
    """How far the worst chosen expert's score stands above the best one left out, over all tokens: at least 0."""
    scores = sigmoid(logits)
    ranked = np.sort(scores if bias is None else scores + float64(bias), axis=-1)[:, ::-1]
    if top_k == ranked.shape[-1] or not len(ranked):
        return math.inf
    return float((ranked[:, top_k - 1] - ranked[:, top_k]).min())


def moe(
    x: Array,
    ids: Array,
    weights: Array,
    gate_proj: Array,
    up_proj: Array,
    down_proj: Array,
    limit: float | None = None,
) -> Float64:
    """The routed experts' weighted sum, without the shared expert.

    x [T, H], ids and weights [T, K], gate_proj and up_proj [E, M, H], down_proj [E, H, M] -> [T, H].
    """
    out = np.zeros(x.shape)
    for expert in np.unique(ids):
        tokens, slots = np.nonzero(ids == expert)
        expert_out = mlp(x[tokens], gate_proj[expert], up_proj[expert], down_proj[expert], limit)
        np.add.at(out, tokens, weights[tokens, slots, None] * expert_out)
    return out


class SafetensorsFolder(Mapping[str, Array]):
    """Every tensor of the `*.safetensors` files in a folder, read from disk when asked for; bfloat16 gives float32."""

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            self._entries |= {name: (path, 8 + header_size, entry) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Array:
        path, data_start, entry = self._entries[name]
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"tensor {name}: found dtype {entry['dtype']}, expected {list(SAFETENSORS_DTYPES)}")
        start, shape = data_start + entry["data_offsets"][0], tuple(entry["shape"])
        array: Array = np.memmap(path, dtype=SAFETENSORS_DTYPES[entry["dtype"]], mode="r", offset=start, shape=shape)
        if entry["dtype"] == "BF16":  # a bfloat16 is the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class LayerPlan:
    """What `config.json` says of one layer; `frequencies` is None without RoPE, a limit None without a clamp."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    frequencies: Float64 | None
    is_moe: bool
    limit: float | None
    shared_limit: float | None


class Reference:
    """A Step-3.5 checkpoint given as its raw `config.json` and its tensors under hub names.

    Raises:
        ValueError: A field or tensor is not of the form that this layer needs; the message names it.
        KeyError: A required field or tensor is missing.
    """

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, Array]) -> None:
        if config.get("moe_router_activation", "sigmoid") != "sigmoid":
            raise ValueError(f"moe_router_activation: found {config['moe_router_activation']!r}, expected 'sigmoid'")
        self.config, self._tensors = config, tensors
        self.hidden_size: int = config["hidden_size"]
        self.layer_count: int = config["num_hidden_layers"]
        self._norm_offset = 1.0 if config.get("zero_centered", True) else 0.0
        self._moe_layers = self._read_moe_layers()
        self.router_margin = math.inf
        """The narrowest choice so far between a chosen expert and one left out; a rounding could turn a near tie."""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Reference:
        """Read `config.json` and all `*.safetensors` of a folder; tensors stay on disk until a layer uses them."""
        return cls(json.loads((folder / "config.json").read_text()), SafetensorsFolder(folder))

    def embed(self, tokens: Sequence[int]) -> Float64:
        """Token ids [T] -> embeddings [T, H]."""
        ids, vocab_size = np.asarray(tokens, dtype=np.int64), self.config["vocab_size"]
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"tokens: found ids {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}")
        return float64(self._tensor("model.embed_tokens.weight", vocab_size, self.hidden_size)[ids])

    def hidden_states(self, tokens: Sequence[int]) -> Float64:
        """Token ids [T] -> the last decoder layer's output [T, H], before the final norm."""
        h = self.embed(tokens)
        for index in range(self.layer_count):
            h = self.decoder_layer(h, index)
        return h

    def logits(self, tokens: Sequence[int]) -> Float64:
        """Token ids [T] -> logits [T, V]; row t predicts token t + 1."""
        tied = self.config.get("tie_word_embeddings", False)
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self._head(self.hidden_states(tokens), "model.norm.weight", head)

    def mtp_logits(self, tokens: Sequence[int], depth_count: int) -> list[Float64]:
        """Logits of the first `depth_count` MTP depths along `tokens`, each drafted token taken from `tokens` itself.

        Element k is [T - 1 - k, V]. Its row t joins `embed(tokens[t + k + 1])` with the target's hidden state at t
        (k = 0, before the final norm) or row t of depth k - 1 (before its `shared_head.norm`), attends to rows 0..t of
        depth k, and predicts the token at position t + k + 2. Row t has RoPE position t at every depth: rotary scores
        depend on distances only, so counting from t + k instead changes nothing.
        """
        available = self.config.get("num_nextn_predict_layers", 0)
        if depth_count > available or depth_count >= len(tokens):
            raise ValueError(
                f"depth_count: found {depth_count}, expected at most num_nextn_predict_layers = {available} "
                f"and fewer than the {len(tokens)} tokens"
            )
        embedded, hidden, logits = self.embed(tokens), self.hidden_states(tokens), []
        for depth in range(depth_count):
            index = self.layer_count + depth
            prefix = f"model.layers.{index}."
            following = self._norm(embedded[depth + 1 :], prefix + "enorm.weight")
            previous = self._norm(hidden[: len(following)], prefix + "hnorm.weight")
            eh_proj = self._matrix(prefix + "eh_proj.weight", self.hidden_size, 2 * self.hidden_size)
            hidden = self.decoder_layer(np.concatenate([following, previous], axis=-1) @ eh_proj.T, index)
            head = prefix + "transformer.shared_head."
            logits.append(self._head(hidden, head + "norm.weight", head + "output.weight"))
        return logits

    def decoder_layer(self, h: Array, index: int) -> Float64:
        """Decoder layer `index` (the MTP tail counts on) over a whole sequence: [T, H] -> [T, H]."""
        plan, prefix = self.plan(index), f"model.layers.{index}."
        h = h + self._attention(self._norm(h, prefix + "input_layernorm.weight"), plan, prefix + "self_attn.")
        x = self._norm(h, prefix + "post_attention_layernorm.weight")
        if plan.is_moe:
            share_expert = self._mlp(x, prefix + "share_expert.", self.config["share_expert_dim"], plan.shared_limit)
            return h + self._moe(x, plan, prefix + "moe.") + share_expert
        return h + self._mlp(x, prefix + "mlp.", self.config["intermediate_size"], plan.shared_limit)

    def plan(self, index: int) -> LayerPlan:
        """The reading of `config.json` for layer `index`."""
        config, kind = self.config, self._per_layer("layer_types", index)
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types[{index}]: found {kind!r}, expected 'full_attention' or 'sliding_attention'")
        other = config.get("attention_other_setting") or {}
        heads = config | other if other.get("attention_type", "sliding_attention") == kind else config
        head_dim: int = heads["head_dim"]

        frequencies = None
        if not config.get("use_rope_layers") or self._per_layer("use_rope_layers", index):
            factors = config.get("partial_rotary_factors")
            rotary_dim = int(head_dim * (self._per_layer("partial_rotary_factors", index) if factors else 1.0))
            scaling = config.get("rope_scaling")
            only = config.get("yarn_only_types")
            scaled = scaling is not None and (not only or kind in only)
            theta = self._per_layer("rope_theta", index)
            frequencies = rope_frequencies(theta, rotary_dim, scaling if scaled else None)

        return LayerPlan(
            heads=heads["num_attention_heads"],
            kv_heads=heads["num_attention_groups"],
            head_dim=head_dim,
            window=config["sliding_window"] if kind == "sliding_attention" else None,
            frequencies=frequencies,
            is_moe=index in self._moe_layers,
            limit=self._limit("swiglu_limits", index),
            shared_limit=self._limit("swiglu_limits_shared", index),
        )

    def _attention(self, x: Array, plan: LayerPlan, prefix: str) -> Float64:
        query_width, kv_width = plan.heads * plan.head_dim, plan.kv_heads * plan.head_dim
        q = self._linear(x, prefix + "q_proj.weight", query_width).reshape(len(x), plan.heads, plan.head_dim)
        k = self._linear(x, prefix + "k_proj.weight", kv_width).reshape(len(x), plan.kv_heads, plan.head_dim)
        v = self._linear(x, prefix + "v_proj.weight", kv_width).reshape(len(x), plan.kv_heads, plan.head_dim)
        if self.config.get("use_qk_norm", True):
            q, k = self._norm(q, prefix + "q_norm.weight"), self._norm(k, prefix + "k_norm.weight")
        if plan.frequencies is not None:
            positions = np.arange(len(x))
            q, k = apply_rope(q, positions, plan.frequencies), apply_rope(k, positions, plan.frequencies)
        out = attention(q, k, v, plan.window)
        if self.config.get("use_head_wise_attn_gate", True):
            out = out * sigmoid(self._linear(x, prefix + "g_proj.weight", plan.heads))[:, :, None]
        return self._linear(out.reshape(len(x), query_width), prefix + "o_proj.weight", self.hidden_size)

    def _mlp(self, x: Array, prefix: str, width: int, limit: float | None) -> Float64:
        gate_proj = self._matrix(prefix + "gate_proj.weight", width, self.hidden_size)
        up_proj = self._matrix(prefix + "up_proj.weight", width, self.hidden_size)
        down_proj = self._matrix(prefix + "down_proj.weight", self.hidden_size, width)
        return mlp(x, gate_proj, up_proj, down_proj, limit)

    def _moe(self, x: Array, plan: LayerPlan, prefix: str) -> Float64:
        config, experts, width = self.config, self.config["moe_num_experts"], self.config["moe_intermediate_size"]
        use_bias = config.get("use_moe_router_bias", True)
        bias = self._tensor(prefix + "router_bias", experts) if use_bias else None
        logits = self._linear(x, prefix + "gate.weight", experts)
        normalize, scale = config.get("norm_expert_weight", True), config["moe_router_scaling_factor"]
        ids, weights = route(logits, bias, config["moe_top_k"], normalize, scale)
        self.router_margin = min(self.router_margin, router_margin(logits, bias, config["moe_top_k"]))
        gate_proj = self._tensor(prefix + "gate_proj.weight", experts, width, self.hidden_size)
        up_proj = self._tensor(prefix + "up_proj.weight", experts, width, self.hidden_size)
        down_proj = self._tensor(prefix + "down_proj.weight", experts, self.hidden_size, width)
        return moe(x, ids, weights, gate_proj, up_proj, down_proj, plan.limit)

    def _head(self, h: Array, norm: str, output: str) -> Float64:
        return self._linear(self._norm(h, norm), output, self.config["vocab_size"])

    def _norm(self, x: Array, name: str) -> Float64:
        return rms_norm(x, self._tensor(name, x.shape[-1]), self.config["rms_norm_eps"], self._norm_offset)

    def _linear(self, x: Array, name: str, width: int) -> Float64:
        return x @ self._matrix(name, width, x.shape[-1]).T

    def _matrix(self, name: str, rows: int, columns: int) -> Float64:
        return float64(self._tensor(name, rows, columns))

    def _tensor(self, name: str, *shape: int) -> Array:
        tensor = self._tensors[name]
        if tensor.shape != shape or tensor.dtype.kind != "f":
            raise ValueError(f"tensor {name}: found {tensor.dtype} {tensor.shape}, expected float {shape}")
        return tensor

    def _per_layer(self, field: str, index: int) -> Any:
        value = self.config[field]
        if not isinstance(value, list):
            return value
        if index >= len(value):
            raise ValueError(f"{field}: found {len(value)} entries, expected at least {index + 1} for layer {index}")
        return 0 if value[index] is None else value[index]

    def _limit(self, field: str, index: int) -> float | None:
        limit = float(self._per_layer(field, index)) if self.config.get(field) else 0.0
        return limit if limit > 0.0 else None

    def _read_moe_layers(self) -> frozenset[int]:
        layers = self.config.get("moe_layers_enum")
        if layers is None:
            return frozenset(range(1, self.layer_count))
        if isinstance(layers, str):
            layers = [part for part in layers.split(",") if part.strip()]
        return frozenset(int(layer) for layer in layers if int(layer) < self.layer_count)
