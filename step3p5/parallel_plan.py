"""How the model lies on several devices: where every tensor is cut, and which collectives run where.

Three ways to serve the model are three rows of data, tables from a tensor's role to the axis that is cut:

- `TENSOR_PARALLEL`: attention by KV groups, dense, shared and expert MLPs by width. Every device has every token.
- `TENSOR_AND_EXPERT_PARALLEL`: the same, but whole experts. Every device has every token.
- `DATA_AND_EXPERT_PARALLEL`: attention and MLPs whole on every device, whole experts. A device has its own requests.

The vocabulary is cut in all of them. What is not in a table is whole on every device. The collectives follow from the
cuts: a product over a cut input axis leaves partial sums, which an all-reduce adds up; own tokens that meet experts of
other devices are dispatched before and combined after.

Why tokens are dispatched to devices. Where every device has every token (TP + EP), local experts add their sums to the
all-reduce that the shared expert needs anyway: they cost no byte. Where devices have their own tokens (DP + EP), there
are four ways to the experts and back. With 288 experts and 8 a token a device sends, in multiples of all tokens' hidden
states:

| devices | gather, reduce-scatter | gather, all-reduce | dispatch, combine: to devices | to experts |
|---|---|---|---|---|
| 2 | 1.00 | 1.50 | 1.00 | 4.00 |
| 4 | 1.50 | 2.25 | 1.35 | 3.00 |
| 8 | 1.75 | 2.63 | 1.16 | 1.75 |

(`python -m step3p5.plan` counts them for a case.) MAX's reduce-scatter takes only devices with equally many tokens, as
they have in captured decode steps and seldom elsewhere; with an all-reduce in its place gathering costs up to twice the
bytes. MAX's own dispatch and combine send to experts: their buffers have a row for every token and expert, 20 GB on
each device for 8192 tokens of each, and `top_k` products of a token come back. So a token is sent once to each device
that has experts of it, and one sum comes back from each (`layers/dispatch.py`), by kernels of this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NoReturn

from step3p5.checkpoint_tensors import TensorRole, TensorSpec, checkpoint_tensors, mtp_tensors
from step3p5.layer_config import DenseMLPConfig, LayerConfig, ModelConfig, MoEConfig

MAX_DEVICES = 8
"""The most devices that MAX's collectives join: its signal buffers have room for no more."""

Splits = Mapping[TensorRole, int]
"""The axis along which the tensors of a role are cut; roles that are not there are whole on every device."""

_ATTENTION: Splits = {
    TensorRole.QUERY: 0,
    TensorRole.KEY: 0,
    TensorRole.VALUE: 0,
    TensorRole.ATTENTION_GATE: 0,
    TensorRole.ATTENTION_OUTPUT: 1,
}
_MLP: Splits = {TensorRole.MLP_GATE: 0, TensorRole.MLP_UP: 0, TensorRole.MLP_DOWN: 1}
_EXPERTS_BY_WIDTH: Splits = {TensorRole.EXPERT_GATE: 1, TensorRole.EXPERT_UP: 1, TensorRole.EXPERT_DOWN: 2}
_EXPERTS_BY_NUMBER: Splits = {TensorRole.EXPERT_GATE: 0, TensorRole.EXPERT_UP: 0, TensorRole.EXPERT_DOWN: 0}
_VOCABULARY: Splits = {TensorRole.EMBEDDING: 0, TensorRole.LM_HEAD: 0}

TENSOR_PARALLEL: Splits = {**_ATTENTION, **_MLP, **_EXPERTS_BY_WIDTH, **_VOCABULARY}
TENSOR_AND_EXPERT_PARALLEL: Splits = {**_ATTENTION, **_MLP, **_EXPERTS_BY_NUMBER, **_VOCABULARY}
DATA_AND_EXPERT_PARALLEL: Splits = {**_EXPERTS_BY_NUMBER, **_VOCABULARY}


class ParallelPlanError(ValueError):
    """The model cannot lie on the devices as asked; the message says what was found, what would do, and the remedy."""


class Collective(StrEnum):
    """An exchange among all devices of the plan."""

    ALL_REDUCE = "all-reduce"
    """Every device has a partial sum, and gets the sum."""

    ALL_GATHER = "all-gather"
    """Every device has its own rows (or columns), and gets those of all."""

    DISPATCH = "dispatch"
    """Every device has its own tokens, and gets those of all that have experts on it."""

    COMBINE = "combine"
    """Every device has its experts' sums for the tokens that it got, and gets the sums of its own tokens."""


@dataclass(frozen=True)
class Placement:
    """How one tensor lies on the devices: whole on each, or cut along `axis` into equal parts, device by device.

    The scales of a quantised tensor are cut by the same placement, since no cut divides a block.
    """

    axis: int | None
    parts: int

    @property
    def is_cut(self) -> bool:
        """Whether a device holds a part only."""
        return self.axis is not None

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one device's part of a tensor of `shape`."""
        return tuple(size // self.parts if axis == self.axis else size for axis, size in enumerate(shape))

    def shard(self, shape: tuple[int, ...], device: int) -> tuple[slice, ...]:
        """The index of a device's part of a tensor of `shape`."""
        sizes = self.shard_shape(shape)
        starts = (device * size if axis == self.axis else 0 for axis, size in enumerate(sizes))
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


WHOLE = Placement(axis=None, parts=1)


@dataclass(frozen=True)
class QuantisedBlocks:
    """Weights that share a scale, `rows` by `columns` of a tensor's last two axes; a cut must not divide them."""

    rows: int
    columns: int
    roles: frozenset[TensorRole]
    """Roles stored in such blocks."""

    def along(self, axis: int, spec: TensorSpec) -> int:
        """The extent of a block along an axis of a tensor, 1 where the tensor has no blocks."""
        from_last = len(spec.shape) - axis
        if spec.role not in self.roles or from_last > 2:
            return 1
        return self.columns if from_last == 1 else self.rows


NO_BLOCKS = QuantisedBlocks(1, 1, frozenset())


@dataclass(frozen=True)
class LayerPlan:
    """The collectives of one layer, `None` where there is none.

    `shared_expert_is_partial`: a MoE layer's shared expert leaves partial sums too; they are added to the experts'
    before `after_mlp`. Otherwise its result is whole and is added after.
    """

    after_attention: Collective | None
    before_mlp: Collective | None
    after_mlp: Collective | None
    shared_expert_is_partial: bool


@dataclass(frozen=True)
class ParallelPlan:
    """Where every tensor of `model`, MTP layers included, lies on `num_devices` devices, and what they exchange.

    `parallel_plan` makes one from MAX's flags.

    Args:
        model: The model.
        num_devices: Devices, each with the same amount of everything.
        splits: Where to cut; see the module's tables.
        own_requests: Whether every device has requests and KV caches of its own, or all have all.
        blocks: Blocks of quantised weights.

    Raises:
        ParallelPlanError: A tensor cannot be cut into equal parts, or a cut would divide a head, an expert or a block.
    """

    model: ModelConfig
    num_devices: int
    splits: Splits
    own_requests: bool
    blocks: QuantisedBlocks = NO_BLOCKS

    def __post_init__(self) -> None:
        for roles in (_EXPERTS_BY_NUMBER, _ATTENTION, _MLP, _VOCABULARY):
            for name, spec in self._tensors.items():
                if spec.role in roles and spec.role in self.splits:
                    self._check(name, spec)
        if self.num_devices > MAX_DEVICES:
            raise ParallelPlanError(
                f"--devices: found {self.num_devices} devices, expected at most {MAX_DEVICES}: MAX's collectives join "
                f"no more. Serve the model several times, on {MAX_DEVICES} devices each."
            )

    @cached_property
    def _tensors(self) -> dict[str, TensorSpec]:
        return checkpoint_tensors(self.model) | mtp_tensors(self.model)

    @cached_property
    def placements(self) -> Mapping[str, Placement]:
        """Where every tensor lies, by hub name."""
        return {name: self._placement(name, spec) for name, spec in self._tensors.items()}

    @cached_property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The collectives of every layer, decoder's first, then the MTP layers'."""
        return tuple(self._layer(layer) for layer in (*self.model.layers, *self.model.mtp_layers))

    @property
    def after_embedding(self) -> Collective | None:
        """Joins the embeddings: a token's row lies on one device, and the others have zeros."""
        return Collective.ALL_REDUCE if self._cuts(TensorRole.EMBEDDING) else None

    @property
    def before_head(self) -> Collective | None:
        """Brings the hidden states of every request to every device's part of the head."""
        return Collective.ALL_GATHER if self.own_requests and self._cuts(TensorRole.LM_HEAD) else None

    @property
    def after_head(self) -> Collective | None:
        """Joins the parts of the logits."""
        return Collective.ALL_GATHER if self._cuts(TensorRole.LM_HEAD) else None

    def experts(self, moe: MoEConfig, device: int) -> range:
        """The experts of which a device holds at least a part; routing always chooses among all of them."""
        if not self._cuts(TensorRole.EXPERT_DOWN) or self.splits[TensorRole.EXPERT_DOWN] != 0:
            return range(moe.num_experts)
        each = moe.num_experts // self.num_devices
        return range(device * each, (device + 1) * each)

    def num_key_value_heads_per_device(self, layer: LayerConfig) -> int:
        """KV heads of a layer that a device holds and caches."""
        return layer.attention.num_key_value_heads // (self.num_devices if self._cuts(TensorRole.KEY) else 1)

    def part_of(self, layer: LayerConfig) -> LayerConfig:
        """The layer as one device computes it: its heads and widths. The experts stay those of the router."""
        heads = layer.attention.num_key_value_heads // self.num_key_value_heads_per_device(layer)
        attention = replace(
            layer.attention,
            num_attention_heads=layer.attention.num_attention_heads // heads,
            num_key_value_heads=layer.attention.num_key_value_heads // heads,
        )
        prefix = f"model.layers.{layer.index}."
        if not isinstance(layer.mlp, MoEConfig):
            return replace(layer, attention=attention, mlp=self._part_of_mlp(layer.mlp, f"{prefix}mlp"))
        shared = self._part_of_mlp(layer.mlp.shared_expert, f"{prefix}share_expert")
        (_, width, _) = self._part_shape(f"{prefix}moe.gate_proj.weight")
        return replace(
            layer, attention=attention, mlp=replace(layer.mlp, intermediate_size=width, shared_expert=shared)
        )

    def _part_of_mlp(self, mlp: DenseMLPConfig, name: str) -> DenseMLPConfig:
        return replace(mlp, intermediate_size=self._part_shape(f"{name}.gate_proj.weight")[0])

    def _part_shape(self, name: str) -> tuple[int, ...]:
        return self.placements[name].shard_shape(self._tensors[name].shape)

    def _cuts(self, role: TensorRole) -> bool:
        return self.num_devices > 1 and role in self.splits

    def _layer(self, layer: LayerConfig) -> LayerPlan:
        prefix = f"model.layers.{layer.index}."
        attention_is_partial = self.placements[f"{prefix}self_attn.o_proj.weight"].is_cut
        after_attention = Collective.ALL_REDUCE if attention_is_partial else None
        if not isinstance(layer.mlp, MoEConfig):
            partial = self.placements[f"{prefix}mlp.down_proj.weight"].is_cut
            return LayerPlan(after_attention, None, Collective.ALL_REDUCE if partial else None, False)
        shared_is_partial = self.placements[f"{prefix}share_expert.down_proj.weight"].is_cut
        if not self.placements[f"{prefix}moe.down_proj.weight"].is_cut:
            return LayerPlan(after_attention, None, None, shared_is_partial)
        if self.own_requests:
            return LayerPlan(after_attention, Collective.DISPATCH, Collective.COMBINE, shared_is_partial)
        return LayerPlan(after_attention, None, Collective.ALL_REDUCE, shared_is_partial)

    def _placement(self, name: str, spec: TensorSpec) -> Placement:
        if not self._cuts(spec.role) or self._stays_whole(name):
            return WHOLE
        return Placement(self.splits[spec.role], self.num_devices)

    def _stays_whole(self, name: str) -> bool:
        """Whether a dense or shared MLP stays whole, all its tensors, because cutting it would divide blocks."""
        module = name.removesuffix(".weight").rpartition(".")[0]
        if not module.endswith((".mlp", ".share_expert")):
            return False
        return any(
            self._divides_blocks(self._tensors[f"{module}.{projection}.weight"])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )

    def _divides_blocks(self, spec: TensorSpec) -> bool:
        axis = self.splits[spec.role]
        return spec.shape[axis] % (self.num_devices * self.blocks.along(axis, spec)) != 0

    def _check(self, name: str, spec: TensorSpec) -> None:
        axis = self.splits[spec.role]
        field, units, what = self._units(name, spec)
        if units % self.num_devices:
            counts = ", ".join(map(str, _divisors(units)))
            raise ParallelPlanError(
                f"{field}: found {units} {what}, which {self.num_devices} devices cannot share equally; expected one "
                f"of {counts} devices. Change --devices."
            )
        # A dense or shared MLP has another way out: see `_stays_whole`.
        if spec.role not in _MLP and self._divides_blocks(spec):
            routed = spec.role in _EXPERTS_BY_WIDTH
            remedy = f"--ep-size {self.num_devices}, which leaves the experts whole" if routed else "fewer devices"
            raise ParallelPlanError(
                f"{name}: found {spec.shape[axis]} on axis {axis}, of which each of {self.num_devices} devices would "
                f"take {spec.shape[axis] // self.num_devices}; expected a multiple of the quantised blocks of "
                f"{self.blocks.along(axis, spec)}. Use {remedy}."
            )

    def _units(self, name: str, spec: TensorSpec) -> tuple[str, int, str]:
        """The field of `config.json` that a cut divides, its value, and what that many there are of."""
        if spec.role in _ATTENTION:
            index = int(name.split(".")[2])
            layer = next(of for of in (*self.model.layers, *self.model.mtp_layers) if of.index == index)
            return "num_attention_groups", layer.attention.num_key_value_heads, "KV groups"
        size = spec.shape[self.splits[spec.role]]
        if spec.role in _VOCABULARY:
            return "vocab_size", size, "tokens"
        if spec.role in _MLP:
            return ("share_expert_dim" if ".share_expert." in name else "intermediate_size"), size, "columns"
        if self.splits[spec.role] == 0:
            return "moe_num_experts", size, "experts"
        return "moe_intermediate_size", size, "columns"


def parallel_plan(
    model: ModelConfig,
    num_devices: int,
    ep_size: int = 1,
    data_parallel_degree: int = 1,
    blocks: QuantisedBlocks = NO_BLOCKS,
) -> ParallelPlan:
    """The plan that MAX's flags ask for.

    Args:
        model: The model.
        num_devices: Number of `--devices`.
        ep_size: `--ep-size`: 1, or the number of devices.
        data_parallel_degree: `--data-parallel-degree`: 1, or the number of devices.
        blocks: Blocks of quantised weights.

    Raises:
        ParallelPlanError: If there is no such plan.
    """
    if num_devices < 1:
        _fail("--devices", f"{num_devices} devices", "1 or more", "Name at least one device.")
    if ep_size not in (1, num_devices):
        remedy = "Share the experts among all devices or none."
        _fail("--ep-size", str(ep_size), _one_or(num_devices), remedy)
    if data_parallel_degree not in (1, num_devices):
        remedy = "Give every device requests of its own, or all devices all requests."
        _fail("--data-parallel-degree", str(data_parallel_degree), _one_or(num_devices), remedy)
    own_requests = data_parallel_degree > 1
    if own_requests and ep_size == 1:
        found = f"{data_parallel_degree} with --ep-size 1"
        remedy = "Without it every device would hold all experts; to serve copies of the model, start several servers."
        _fail("--data-parallel-degree", found, f"--ep-size {num_devices} beside it", remedy)
    if ep_size > 1 and not any(isinstance(layer.mlp, MoEConfig) for layer in model.layers):
        _fail("--ep-size", f"{ep_size}, but no layer has experts", "1", "Leave the flag out.")
    splits = TENSOR_PARALLEL
    if ep_size > 1:
        splits = DATA_AND_EXPERT_PARALLEL if own_requests else TENSOR_AND_EXPERT_PARALLEL
    return ParallelPlan(model, num_devices, splits, own_requests, blocks)


def _one_or(num_devices: int) -> str:
    return "1" if num_devices == 1 else f"1 or {num_devices}, the number of devices"


def _fail(name: str, found: str, expected: str, remedy: str) -> NoReturn:
    raise ParallelPlanError(f"{name}: found {found}, expected {expected}. {remedy}")


def _divisors(number: int) -> Iterator[int]:
    return (count for count in range(1, MAX_DEVICES + 1) if number % count == 0)
