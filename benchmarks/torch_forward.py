"""The forward pass in plain PyTorch, in any floating-point type: what a bfloat16 model's logits are measured against.

Written from the equations, with PyTorch's own operations only; the checkpoint's tensors stay in their stored type and
are cast matrix by matrix, so that a float64 pass of a bfloat16 checkpoint needs little more memory than the checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from step3p5.config_parser import parse_model_config
from step3p5.layer_config import AttentionConfig, DenseMLPConfig, LayerConfig, MoEConfig
from step3p5.layers.rope import rotary_frequencies


class TorchForward:
    """A checkpoint's decoder.

    Args:
        folder: The checkpoint.
        device: Where its tensors lie and the pass runs.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.config = parse_model_config(json.loads((folder / "config.json").read_text()))
        mtp = tuple(f"model.layers.{layer.index}." for layer in self.config.mtp_layers)
        self.tensors: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors = load_file(shard)
            self.tensors |= {name: value.to(device) for name, value in tensors.items() if not name.startswith(mtp)}
        self.device = device
        self.dtype = torch.float64

    def last_logits(self, prompt: list[int], dtype: torch.dtype) -> Tensor:
        """The logits after the prompt's last token, `[vocab_size]` float64, computed in `dtype`."""
        with torch.inference_mode():
            return self._last_logits(prompt, dtype)

    def _last_logits(self, prompt: list[int], dtype: torch.dtype) -> Tensor:
        self.dtype = dtype
        h = self.tensors["model.embed_tokens.weight"][torch.tensor(prompt, device=self.device)].to(dtype)
        for layer in self.config.layers:
            h = self._layer(h, layer)
        x = self._norm(h[-1:], "model.norm.weight")
        tied = self.config.tie_word_embeddings
        return self._linear(x, "model.embed_tokens.weight" if tied else "lm_head.weight")[0].double()

    def _layer(self, h: Tensor, layer: LayerConfig) -> Tensor:
        prefix = f"model.layers.{layer.index}."
        h = h + self._attention(
            self._norm(h, prefix + "input_layernorm.weight"), layer.attention, prefix + "self_attn."
        )
        x = self._norm(h, prefix + "post_attention_layernorm.weight")
        if isinstance(layer.mlp, MoEConfig):
            shared = self._mlp(x, prefix + "share_expert.", layer.mlp.shared_expert)
            return h + (self._moe(x, layer.mlp, prefix + "moe.") + shared)
        return h + self._mlp(x, prefix + "mlp.", layer.mlp)

    def _attention(self, x: Tensor, config: AttentionConfig, prefix: str) -> Tensor:
        tokens = len(x)
        q, k, v = (
            self._linear(x, f"{prefix}{name}_proj.weight").view(tokens, -1, config.head_dim) for name in ("q", "k", "v")
        )
        if config.qk_norm:
            q, k = self._norm(q, prefix + "q_norm.weight"), self._norm(k, prefix + "k_norm.weight")
        if config.rope is not None:
            angles = torch.arange(tokens, device=self.device, dtype=torch.float64)[:, None] * torch.tensor(
                rotary_frequencies(config.rope), device=self.device
            )
            q, k = _rotated(q, angles), _rotated(k, angles)
        distance = torch.arange(tokens, device=self.device)[:, None] - torch.arange(tokens, device=self.device)
        visible = distance >= 0
        if config.sliding_window is not None:
            visible &= distance < config.sliding_window
        out = functional.scaled_dot_product_attention(
            *(heads.transpose(0, 1)[None] for heads in (q, k, v)), attn_mask=visible, enable_gqa=True
        )[0].transpose(0, 1)
        if config.head_wise_gate:
            out = out * torch.sigmoid(self._linear(x, prefix + "g_proj.weight"))[:, :, None]
        return self._linear(out.reshape(tokens, -1), prefix + "o_proj.weight")

    def _mlp(self, x: Tensor, prefix: str, config: DenseMLPConfig) -> Tensor:
        gate, up = self._linear(x, prefix + "gate_proj.weight"), self._linear(x, prefix + "up_proj.weight")
        return self._linear(_swiglu(gate, up, config.swiglu_limit), prefix + "down_proj.weight")

    def _moe(self, x: Tensor, config: MoEConfig, prefix: str) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)  # the gate runs in float32
        logits = x.to(wide) @ self.tensors[prefix + "gate.weight"].to(wide).T
        scores = torch.sigmoid(logits)
        choice = scores + self.tensors[prefix + "router_bias"].to(wide) if config.router_bias else scores
        ids = choice.topk(config.top_k, dim=-1).indices
        weights = scores.gather(-1, ids)
        if config.normalize_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * config.router_scaling_factor
        out = torch.zeros(x.shape, device=self.device, dtype=wide)
        for expert in ids.unique().tolist():
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            gate, up, down = (
                self.tensors[f"{prefix}{name}_proj.weight"][expert].to(self.dtype) for name in ("gate", "up", "down")
            )
            act = _swiglu(x[tokens] @ gate.T, x[tokens] @ up.T, config.swiglu_limit)
            out.index_add_(0, tokens, weights[tokens, slots, None] * (act @ down.T))
        return out.to(self.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.to(torch.promote_types(self.dtype, torch.float32))
        offset = 1.0 if self.config.zero_centered_norm else 0.0
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale * (offset + self.tensors[name].to(wide.dtype))).to(self.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tensors[name].to(self.dtype).T


def _swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    bound = math.inf if limit is None else limit
    return functional.silu(gate).clamp(max=bound) * up.clamp(-bound, bound)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    half = angles.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cosines, sines = angles.cos().to(wide.dtype)[:, None], angles.sin().to(wide.dtype)[:, None]
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines, rest], -1).to(x.dtype)
