"""How large the GPUs' mailboxes are, through which tokens reach other GPUs' experts."""

from __future__ import annotations

from .layer_config import ModelConfig, MoEConfig

HEADER_BYTES = 256
"""Of a mailbox's flags; `HEADER_BYTES` of the kernels."""

ROUTE_BYTES = 8
"""Of a token's choice of one expert: its number, int32, and its weight, float32."""

GRANULE = 128
"""A mailbox has room for a multiple of so many tokens: whatever follows them is aligned."""


def mailbox_bytes(model: ModelConfig, num_devices: int, num_tokens: int, itemsize: int) -> int:
    """Size of each of `num_devices` mailboxes with room for `num_tokens` tokens of each device.

    A token takes its experts and their weights, its hidden state of `itemsize` bytes an element, and in every other
    device's mailbox the sum of the experts there.
    """
    tokens = -(-num_tokens // GRANULE) * GRANULE
    top_k = max(layer.mlp.top_k for layer in model.layers if isinstance(layer.mlp, MoEConfig))
    return HEADER_BYTES + tokens * (ROUTE_BYTES * top_k + (1 + num_devices) * model.hidden_size * itemsize)


def most_tokens(max_batch_input_tokens: int, max_batch_size: int, whole_prompt: int) -> int:
    """The most tokens that one device has in a step: what the scheduler may take of prompts, a token of each request
    that decodes beside them, and a prompt of `whole_prompt` tokens more where the scheduler does not cut prompts."""
    return max_batch_input_tokens + max_batch_size + whole_prompt
