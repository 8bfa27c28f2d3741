"""The rotary embedding of every layer, out of the two forms in which `config.json` describes it.

The hub's form: `rope_theta` and `partial_rotary_factors`, each a number or a list with an entry a layer, and one
`rope_scaling` that holds on the layers whose type is in `yarn_only_types`. transformers' form: `rope_parameters`, one
object for all layers or one for each layer type. A config may use both as long as they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from step3p5.config_fields import (
    ConfigError,
    Llama3Fields,
    RopeFields,
    RopeTypeFields,
    fail,
    mapping,
    one_or_list_of,
    positive_number,
    read_field,
    read_fields,
    refuse_other_fields,
    rotary_factor,
    shown,
)
from step3p5.layer_config import AttentionKind, Llama3Scaling, RopeConfig

_HUB_FIELDS = {"theta": "rope_theta", "factor": "partial_rotary_factors", "scaling": "rope_scaling (yarn_only_types)"}

Scaling = Llama3Scaling | Literal["default"]


@dataclass(frozen=True)
class _Statement:
    """What one form says of one layer; `None` where it says nothing."""

    source: str
    theta: float | None = None
    factor: float | None = None
    scaling: Scaling | None = None


def parse_rope(config: Mapping[str, Any], kinds: Sequence[AttentionKind], head_dim: int) -> list[RopeConfig | None]:
    """The rotary embedding of each layer, `None` where `use_rope_layers` switches it off.

    Args:
        config: the text model's fields.
        kinds: each layer's attention pattern, MTP layers included; its length is the number of layers.
        head_dim: the width of which a layer rotates the first `head_dim * factor` dims.

    Raises:
        ConfigError: a field is mistyped, missing, too short, or contradicts another; an unknown `rope_type`; an odd or
            fractional number of rotated dims.
    """
    fields = read_fields(RopeFields, config)
    switches = per_layer("use_rope_layers", fields.use_rope_layers or True, len(kinds))
    thetas = per_layer("rope_theta", fields.rope_theta, len(kinds))
    factors = per_layer("partial_rotary_factors", fields.partial_rotary_factors or None, len(kinds))
    scaling = _scaling(fields.rope_scaling or {}, "rope_scaling")
    parameters = _parameters_by_kind(fields, kinds)

    ropes: list[RopeConfig | None] = []
    for index, kind in enumerate(kinds):
        scaled_here = _restricted(scaling, kind, fields.yarn_only_types)
        hub = _Statement(
            "rope_theta / partial_rotary_factors / rope_scaling", thetas[index], factors[index], scaled_here
        )
        rope = _rope(index, hub, parameters[index], head_dim)
        ropes.append(rope if switches[index] else None)
    return ropes


def per_layer(name: str, value: Any, count: int) -> list[Any]:
    """`value` as a list with an entry a layer: a tuple of at least `count` is cut, anything else holds everywhere.

    Raises:
        ConfigError: the list is shorter.
    """
    if not isinstance(value, tuple):
        return [value] * count
    if len(value) < count:
        fail(
            name,
            f"{len(value)} entries",
            f"{count}, one for each of num_hidden_layers + num_nextn_predict_layers",
            "Complete the list (or lower num_nextn_predict_layers, if the checkpoint has no MTP layers).",
        )
    return list(value[:count])


def _rope(index: int, hub: _Statement, other: _Statement, head_dim: int) -> RopeConfig:
    theta = _agreed("theta", index, hub, other)
    if theta is None:
        fail("rope_theta", f"none for layer {index}", "a positive finite number", "Add the field to config.json.")
    factor = _agreed("factor", index, hub, other)
    rotary_dim = head_dim * (1.0 if factor is None else factor)
    if rotary_dim % 2 != 0:
        fail(
            "partial_rotary_factors",
            f"{factor} for layer {index}, {rotary_dim} of head_dim {head_dim} dims rotated",
            "an even number of rotated dims, which are paired",
        )
    scaling = _agreed("scaling", index, hub, other)
    return RopeConfig(theta, int(rotary_dim), scaling if isinstance(scaling, Llama3Scaling) else None)


def _agreed(what: str, index: int, hub: _Statement, other: _Statement) -> Any:
    """The value of `what` that the two forms state for layer `index`, `None` if neither does."""
    mine, theirs = getattr(hub, what), getattr(other, what)
    if mine is not None and theirs is not None and mine != theirs:
        raise ConfigError(
            f"{other.source}: found {what} {theirs} for layer {index}, expected what {_HUB_FIELDS[what]} says of the "
            f"same, {mine}. Remove the wrong one of the two."
        )
    return theirs if mine is None else mine


def _parameters_by_kind(fields: RopeFields, kinds: Sequence[AttentionKind]) -> list[_Statement]:
    """What `rope_parameters` says of each layer, of either shape: one object, or one for each layer type."""
    parameters = fields.rope_parameters or {}
    if not set(parameters) & set(AttentionKind):
        return _statements(parameters, "rope_parameters", kinds, fields.yarn_only_types)

    for name in parameters:
        if name not in set(AttentionKind):
            fail(f"rope_parameters.{name}", "such an entry", f"only {', '.join(AttentionKind)} beside one another")
    by_kind = {}
    for kind in AttentionKind:
        source = f"rope_parameters.{kind}"
        group = read_field(source, mapping, parameters.get(kind) or {})
        by_kind[kind] = _statements(group, source, kinds, list(AttentionKind))
    return [by_kind[kind][index] for index, kind in enumerate(kinds)]


def _statements(
    group: Mapping[str, Any], source: str, kinds: Sequence[AttentionKind], scaled_kinds: Sequence[AttentionKind]
) -> list[_Statement]:
    """What one `rope_parameters` object would say of each layer; the numbers in it may themselves be lists."""
    group = dict(group)
    theta, factor = group.pop("rope_theta", None), group.pop("partial_rotary_factor", None)
    if theta is not None:
        theta = read_field(f"{source}.rope_theta", one_or_list_of(positive_number), theta)
    if factor is not None:
        factor = read_field(f"{source}.partial_rotary_factor", one_or_list_of(rotary_factor), factor)
    thetas = per_layer(f"{source}.rope_theta", theta, len(kinds))
    factors = per_layer(f"{source}.partial_rotary_factor", factor, len(kinds))
    scaling = _scaling(group, source)
    return [
        _Statement(source, thetas[index], factors[index], _restricted(scaling, kind, scaled_kinds))
        for index, kind in enumerate(kinds)
    ]


def _restricted(scaling: Scaling | None, kind: AttentionKind, kinds: Sequence[AttentionKind]) -> Scaling | None:
    """`scaling` as it stands for a layer of `kind` when it holds on layers of `kinds` only (empty: on every layer)."""
    return "default" if scaling is not None and kinds and kind not in kinds else scaling


def _scaling(entries: Mapping[str, Any], source: str) -> Scaling | None:
    """A `rope_scaling` object, or the part of a `rope_parameters` object that scales; `None` where it says nothing."""
    entries = {name: value for name, value in entries.items() if value is not None}
    if not entries:
        return None
    older = entries.pop("type", None)
    if older is not None and entries.setdefault("rope_type", older) != older:
        fail(f"{source}.type", shown(older), f"the same as rope_type, {shown(entries['rope_type'])}")
    prefix = f"{source}."
    if read_fields(RopeTypeFields, entries, prefix).rope_type == "default":
        refuse_other_fields(RopeTypeFields, entries, prefix)
        return "default"
    refuse_other_fields(Llama3Fields, entries, prefix)
    llama3 = read_fields(Llama3Fields, entries, prefix)
    if llama3.high_freq_factor <= llama3.low_freq_factor:
        fail(
            f"{prefix}high_freq_factor",
            shown(llama3.high_freq_factor),
            f"a number above low_freq_factor, {llama3.low_freq_factor}, between which the frequencies are blended",
        )
    return Llama3Scaling(
        factor=llama3.factor,
        low_freq_factor=llama3.low_freq_factor,
        high_freq_factor=llama3.high_freq_factor,
        original_max_position_embeddings=llama3.original_max_position_embeddings,
    )
