"""Reading `config.json`: the table of fields, the type and range of each, and the error that names what is wrong.

A field is required unless its absence means the same in every implementation of the model (the checkpoint's own
modelling file, transformers, vLLM, mlx-lm). Where their defaults differ (`head_dim`, `layer_types`,
`moe_router_scaling_factor`, `use_head_wise_attn_gate`, ...) a checkpoint must say what it is. `null` counts as absent.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from step3p5.layer_config import AttentionKind

MAX_TOP_K = 16
"""The most experts a token can be routed to: the routing kernels keep a token's choice in registers of this size."""

REQUIRED = object()

T = TypeVar("T")
Reader = Callable[[object], T]


class ConfigError(ValueError):
    """A `config.json` that is no valid Step-3.5 configuration; the message names field, found, expected and remedy."""


class MismatchError(Exception):
    """Raised by a reader: `expected` describes a valid value; `where` is the path below the field (`[3]`)."""

    def __init__(self, expected: str, where: str = "", found: object = REQUIRED) -> None:
        super().__init__(expected)
        self.expected = expected
        self.where = where
        self.found = found


def fail(name: str, found: str, expected: str, remedy: str = "Correct the field in config.json.") -> NoReturn:
    """Raises the one-line `ConfigError` for field `name`."""
    raise ConfigError(f"{name}: found {found}, expected {expected}. {remedy}")


def shown(value: object) -> str:
    """`value` as an error message shows it: JSON spelling of null and booleans, type named, long lists abridged."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def positive_int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise MismatchError("a positive integer")
    return value


def natural_int(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MismatchError("an integer of 0 or more")
    return value


def _finite(value: object, expected: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise MismatchError(expected)
    return float(value)


def positive_number(value: object) -> float:
    number = _finite(value, "a positive finite number")
    if number <= 0:
        raise MismatchError("a positive finite number")
    return number


def rotary_factor(value: object) -> float:
    """A layer's share of rotated dims; `null` in a list means that the layer has no factor of its own: all rotate."""
    if value is None:
        return 1.0
    number = _finite(value, "a number above 0 and at most 1")
    if not 0 < number <= 1:
        raise MismatchError("a number above 0 and at most 1")
    return number


def swiglu_limit(value: object) -> float | None:
    """`null` and 0 mean that nothing is clamped."""
    if value is None:
        return None
    expected = "null, 0 (both: no limit) or a positive finite number"
    number = _finite(value, expected)
    if number < 0:
        raise MismatchError(expected)
    return number or None


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise MismatchError("true or false")
    return value


def layer_flag(value: object) -> bool:
    """An entry of a per-layer list of flags, also written 0, 1 or `null` (off)."""
    if value is None or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise MismatchError("true, false, 1, 0 or null (off)")


def one_of(*allowed: object) -> Reader[Any]:
    """Accepts the listed JSON values only."""

    def read(value: object) -> object:
        if value not in allowed:
            raise MismatchError(" or ".join(map(repr, allowed)))
        return value

    return read


def attention_kind(value: object) -> AttentionKind:
    return AttentionKind(one_of(*map(str, AttentionKind))(value))


def mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise MismatchError("an object")
    return value


def list_of(entry: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list whose entries `entry` reads."""

    def read(value: object) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise MismatchError("a list")
        result = []
        for index, item in enumerate(value):
            try:
                result.append(entry(item))
            except MismatchError as mismatch:
                raise MismatchError(mismatch.expected, f"[{index}]", item) from None
        return tuple(result)

    return read


def one_or_list_of(entry: Reader[T]) -> Reader[T | tuple[T, ...]]:
    """One value for every layer, or a list with a value a layer."""

    def read(value: object) -> T | tuple[T, ...]:
        if isinstance(value, list | tuple):
            return list_of(entry)(value)
        try:
            return entry(value)
        except MismatchError as mismatch:
            raise MismatchError(f"{mismatch.expected}, or a list of them") from None

    return read


def layer_indices(value: object) -> tuple[int, ...]:
    """Layer indices as a list of integers or a comma-separated string; an empty one names no layer."""
    expected = 'a list of layer indices or a comma-separated string of them ("3,4,5")'
    if isinstance(value, str):
        items = [item.strip() for item in value.split(",")] if value.strip() else []
        if not all(item.isascii() and item.isdigit() for item in items):
            raise MismatchError(expected)
        return tuple(int(item) for item in items)
    if not isinstance(value, list | tuple):
        raise MismatchError(expected)
    return list_of(natural_int)(value)


def config_field(read: Reader[Any], absent: object = REQUIRED) -> Any:
    """A row of a field table: how the field is read, and its value where `config.json` lacks it."""
    return field(metadata={"read": read, "absent": absent})


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """Every field of the text model but the MoE's and RoPE's, in the hub's spelling. Lists have an entry a layer."""

    model_type: str = config_field(one_of("step3p5"), absent="step3p5")
    hidden_size: int = config_field(positive_int)
    intermediate_size: int = config_field(positive_int)
    num_hidden_layers: int = config_field(positive_int)
    num_nextn_predict_layers: int = config_field(natural_int, absent=0)
    vocab_size: int = config_field(positive_int)
    max_position_embeddings: int = config_field(positive_int)
    rms_norm_eps: float = config_field(positive_number)
    hidden_act: str = config_field(one_of("silu"), absent="silu")
    tie_word_embeddings: bool = config_field(flag, absent=False)
    zero_centered: bool = config_field(flag, absent=True)
    num_attention_heads: int = config_field(positive_int)
    num_attention_groups: int = config_field(positive_int)
    head_dim: int = config_field(positive_int)
    layer_types: tuple[AttentionKind, ...] = config_field(list_of(attention_kind))
    sliding_window: int | None = config_field(positive_int, absent=None)
    attention_other_setting: Mapping[str, Any] = config_field(mapping, absent={})
    num_attention_heads_per_layer: tuple[int, ...] = config_field(list_of(positive_int), absent=())
    use_head_wise_attn_gate: bool = config_field(flag)
    use_qk_norm: bool = config_field(flag, absent=True)
    moe_layers_enum: tuple[int, ...] | None = config_field(layer_indices, absent=None)
    swiglu_limits: tuple[float | None, ...] = config_field(list_of(swiglu_limit), absent=())
    swiglu_limits_shared: tuple[float | None, ...] = config_field(list_of(swiglu_limit), absent=())


@dataclass(frozen=True, kw_only=True)
class MoEFields:
    """The fields of the MoE layers; read only where there is one."""

    moe_num_experts: int = config_field(positive_int)
    moe_top_k: int = config_field(positive_int)
    moe_intermediate_size: int = config_field(positive_int)
    share_expert_dim: int = config_field(positive_int)
    moe_router_activation: str = config_field(one_of("sigmoid"))
    moe_router_scaling_factor: float = config_field(positive_number)
    use_moe_router_bias: bool = config_field(flag)
    need_fp32_gate: bool = config_field(flag)
    norm_expert_weight: bool = config_field(flag, absent=True)


@dataclass(frozen=True, kw_only=True)
class RopeFields:
    """The rotary fields in the hub's spelling. `rope_theta` may be absent only where `rope_parameters` has it.

    Without `yarn_only_types` (absent or empty) `rope_scaling` holds on every layer: so read the checkpoint's modelling
    file, vLLM and mlx-lm. Without `use_rope_layers` every layer has RoPE.
    """

    rope_theta: float | tuple[float, ...] | None = config_field(one_or_list_of(positive_number), absent=None)
    partial_rotary_factors: float | tuple[float, ...] | None = config_field(one_or_list_of(rotary_factor), absent=None)
    rope_scaling: Mapping[str, Any] | None = config_field(mapping, absent=None)
    rope_parameters: Mapping[str, Any] | None = config_field(mapping, absent=None)
    yarn_only_types: tuple[AttentionKind, ...] = config_field(list_of(attention_kind), absent=())
    use_rope_layers: tuple[bool, ...] = config_field(list_of(layer_flag), absent=())


@dataclass(frozen=True, kw_only=True)
class SlidingFields:
    """`attention_other_setting`: what sliding layers have otherwise. Absent entries are as on the full layers."""

    attention_type: str = config_field(one_of("sliding_attention"), absent="sliding_attention")
    num_attention_heads: int | None = config_field(positive_int, absent=None)
    num_attention_groups: int | None = config_field(positive_int, absent=None)
    head_dim: int | None = config_field(positive_int, absent=None)


@dataclass(frozen=True, kw_only=True)
class RopeTypeFields:
    """`rope_scaling` with its type only; `type` is the older spelling of `rope_type`."""

    rope_type: str = config_field(one_of("default", "llama3"))


@dataclass(frozen=True, kw_only=True)
class Llama3Fields(RopeTypeFields):
    """`rope_scaling` of type llama3, whole."""

    factor: float = config_field(positive_number)
    low_freq_factor: float = config_field(positive_number)
    high_freq_factor: float = config_field(positive_number)
    original_max_position_embeddings: int = config_field(positive_int)


UNSUPPORTED_UNLESS: dict[str, tuple[object, ...]] = {
    "att_impl_type": ("GQA",),
    "attention_bias": (False,),
    "attn_logit_softcapping": (),
    "fp32_residual_connection": (False,),
    "mlp_bias": (False,),
    "sink": (False,),
    "use_bidirectional_attention": (False,),
}
"""Fields that change the computation in other members of the family, with the values (besides absence) that do not."""


def read_field(name: str, read: Reader[T], value: object) -> T:
    """`value` read as field `name`.

    Raises:
        ConfigError: `value` is not what `read` takes.
    """
    try:
        return read(value)
    except MismatchError as mismatch:
        found = value if mismatch.found is REQUIRED else mismatch.found
        fail(name + mismatch.where, shown(found), mismatch.expected)


def read_fields(table: type[T], config: Mapping[str, Any], prefix: str = "") -> T:
    """The fields of `table` (a dataclass of `config_field` rows) read from `config`.

    Raises:
        ConfigError: a required field is missing, or a field has the wrong type or value.
    """
    values: dict[str, Any] = {}
    for row in fields(table):  # type: ignore[arg-type]
        read, absent = row.metadata["read"], row.metadata["absent"]
        value = config.get(row.name)
        if value is not None:
            values[row.name] = read_field(prefix + row.name, read, value)
        elif absent is not REQUIRED:
            values[row.name] = absent
        else:
            found = "null" if row.name in config else "no such field"
            try:
                read(REQUIRED)
            except MismatchError as mismatch:
                fail(prefix + row.name, found, mismatch.expected, "Add the field to config.json.")
    return table(**values)


def refuse_other_fields(table: type[Any], config: Mapping[str, Any], prefix: str) -> None:
    """Refuses entries of the object `config` that `table` does not know: nothing here would take account of them.

    Raises:
        ConfigError: there is one, and it is not null.
    """
    known = [row.name for row in fields(table)]
    for name, value in config.items():
        if name not in known and value is not None:
            path = f"{prefix}{name}" if name.isidentifier() else f"{prefix[:-1]}[{name!r}]"
            fail(path, shown(value), f"only {', '.join(known)} beside it", "Remove the entry.")
