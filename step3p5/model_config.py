"""`Step3p5Config`: what MAX needs to know to build and cache for the model, drawn from the parsed configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import MultiKVCacheParams
from max.nn.rotary_embedding import Llama3RopeScalingParams
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.architectures.llama3.model_config import Llama3Config
from max.pipelines.kv_cache import cache_dtype_for_encoding
from max.pipelines.lib import KVCacheConfig, MAXModelConfig, PipelineConfig
from max.pipelines.lib.config.model_config import _select_quantization_encoding
from max.pipelines.modeling.config_enums import SupportedEncoding, supported_encoding_dtype
from transformers import AutoConfig
from typing_extensions import override

from .checkpoint_files import check_tensors, decoder_tensors, read_headers
from .config_fields import ConfigError
from .config_parser import parse_model_config
from .layer_config import (
    AttentionConfig,
    AttentionKind,
    DenseMLPConfig,
    LayerConfig,
    Llama3Scaling,
    ModelConfig,
    MoEConfig,
)
from .parallel_plan import ParallelPlan, parallel_plan
from .pretrained_config import as_step3p5_config
from .speculation.depth import drafting_layers

MINIMUM_CPU_WINDOW = 128
"""MAX's CPU attention masks a sliding window in SIMD pieces and takes none smaller than this."""


@dataclass(kw_only=True)
class Step3p5Config(Llama3Config):
    """Model configuration for Step-3.5-Flash.

    `model` is the validated, per-layer form of the checkpoint's configuration and the only one that the graph reads.
    The flat fields are MAX's public surface; where `model` is not given it is parsed from them.
    """

    DEFAULT_ENCODING: ClassVar[SupportedEncoding] = "bfloat16"
    SUPPORTED_ENCODINGS: ClassVar[set[SupportedEncoding]] = {"float32", "bfloat16"}

    kv_params: MultiKVCacheParams  # one child per attention kind, where Llama has one cache

    sliding_window: int = 512
    """Sliding window size for local attention layers."""

    num_attention_groups: int = 8
    """Number of KV head groups on full attention layers."""

    head_dim: int = 128
    """Dimension of each attention head."""

    layer_types: list[str] = field(default_factory=list)
    """Per-layer attention type: `full_attention` or `sliding_attention`."""

    sliding_num_attention_heads: int = 96
    """Number of attention heads for sliding attention layers."""

    sliding_num_attention_groups: int = 8
    """Number of KV head groups for sliding attention layers."""

    per_layer_rope_theta: list[float] = field(default_factory=list)
    """Per-layer RoPE theta values. If empty, uses the single `rope_theta`."""

    partial_rotary_factors: list[float] = field(default_factory=list)
    """Per-layer partial rotary factors (0.5 for full attention, 1.0 for sliding)."""

    yarn_only_types: list[str] = field(default_factory=list)
    """Layer types that use rope scaling, such as `["full_attention"]`."""

    use_head_wise_attn_gate: bool = True
    """Whether to use per-head sigmoid attention gating (`g_proj`)."""

    moe_num_experts: int = 288
    """Number of routed experts in MoE layers."""

    moe_top_k: int = 8
    """Number of experts activated per token."""

    moe_intermediate_size: int = 1280
    """Intermediate dimension of each MoE expert MLP."""

    share_expert_dim: int = 1280
    """Intermediate dimension of the shared expert MLP."""

    moe_layers: set[int] = field(default_factory=set)
    """Set of layer indices that use MoE instead of a dense MLP."""

    moe_router_scaling_factor: float = 3.0
    """Scaling factor applied to routed expert weights."""

    norm_expert_weight: bool = True
    """Whether to normalize top-k expert weights to sum to 1."""

    swiglu_limits: list[float] = field(default_factory=list)
    """Per-layer SwiGLU clamp limits of the routed experts; 0.0 means none."""

    swiglu_limits_shared: list[float] = field(default_factory=list)
    """Per-layer SwiGLU clamp limits of the shared experts and dense MLPs; 0.0 means none."""

    model: ModelConfig = field(default=None, repr=False)  # type: ignore[assignment]  # filled in below when absent
    """The validated configuration, one object per layer."""

    plan: ParallelPlan = field(default=None, repr=False)  # type: ignore[assignment]  # filled in below when absent
    """Where every tensor lies on the devices; without expert parallelism where none is given."""

    drafting_layers: tuple[LayerConfig, ...] = ()
    """The MTP layers that draft, in order of depth; none without speculation."""

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = parse_model_config(_hub_mapping(self))
        if self.plan is None:
            self.plan = parallel_plan(self.model, len(self.devices))

    @override
    @staticmethod
    def calculate_attention_multiplier(huggingface_config: AutoConfig) -> float:
        """Scale of the attention scores: `head_dim ** -0.5`."""
        return float(as_step3p5_config(huggingface_config).model_config.layers[0].attention.head_dim) ** -0.5

    @override
    @classmethod
    def calculate_max_seq_len(cls, huggingface_config: AutoConfig, model_config: MAXModelConfig) -> int:
        """`--max-length`, or the checkpoint's `max_position_embeddings` where it is not given.

        Raises:
            ConfigError: The flag is not 1 to `max_position_embeddings`, or the checkpoint's configuration is not valid.
        """
        limit = as_step3p5_config(huggingface_config).model_config.max_position_embeddings
        length = limit if model_config.max_length is None else model_config.max_length
        if not 1 <= length <= limit:
            raise ConfigError(
                f"--max-length: found {length}, expected 1 to {limit} (max_position_embeddings in config.json). Change "
                "the flag."
            )
        return length

    @override
    @staticmethod
    def construct_kv_params(  # static and hybrid, as the public API has it
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> MultiKVCacheParams:
        """One paged cache per attention kind; the sliding one keeps `sliding_window` tokens of each request.

        Raises:
            ConfigError: If layers of one attention kind differ in their KV heads, `head_dim` or window, or
                `--kv-cache-format` asks a CPU for another type than float32.
        """
        model = as_step3p5_config(huggingface_config).model_config
        drafting = drafting_layers(pipeline_config, model)
        # Each depth but the first reads up to so many keys again that lie before the next query's window.
        reread = max(len(drafting) - 1, 0)
        caches = {}
        for kind, (attention, num_layers) in _attention_kinds((*model.layers, *drafting)).items():
            caches[str(kind)] = kv_cache_config.to_params(
                dtype=_cache_dtype(cache_dtype, kv_cache_config, devices[0]),
                n_kv_heads=attention.num_key_value_heads,
                head_dim=attention.head_dim,
                num_layers=num_layers,
                devices=devices,
                data_parallel_degree=pipeline_config.model.data_parallel_degree,
                speculative_method="mtp" if drafting else None,
                num_draft_tokens=len(drafting),
                window_size=attention.sliding_window and attention.sliding_window + reread,
            )
        return MultiKVCacheParams.from_params(caches)

    @override
    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Builds the configuration from a pipeline's.

        Args:
            pipeline_config: The pipeline's configuration.
            model_config: Overrides `pipeline_config.model`.
            max_seq_len: Longest sequence to plan for; the model's own limit where absent.

        Raises:
            ValueError: If the checkpoint's `config.json` could not be loaded.
        """
        model_config = model_config or pipeline_config.model
        huggingface_config = model_config.huggingface_config
        if huggingface_config is None:
            raise ValueError(
                f"config.json: not found or not readable in {model_config.model_path!r}; expected a Step-3.5 "
                "checkpoint; check --model"
            )
        return cls.initialize_from_config(pipeline_config, huggingface_config, model_config, max_seq_len=max_seq_len)

    @override
    @classmethod
    def initialize_from_config(
        cls,
        pipeline_config: PipelineConfig,
        huggingface_config: AutoConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int | None = None,
    ) -> Self:
        """Builds the configuration from a pipeline's and a checkpoint's; see `initialize`.

        A local checkpoint's files are checked here, before anything is read from them or compiled.

        Raises:
            ConfigError: If the checkpoint's configuration is not valid, or not runnable on the devices.
            ParallelPlanError: If the model cannot lie on the devices as `--ep-size` and `--data-parallel-degree` say.
            CheckpointError: If its files are not what the configuration says.
        """
        model_config = model_config or pipeline_config.model
        model = as_step3p5_config(huggingface_config).model_config
        encoding = _select_quantization_encoding(model_config, cls.DEFAULT_ENCODING)
        devices = device_refs(model_config)
        plan = parallel_plan(model, len(devices), pipeline_config.runtime.ep_size, model_config.data_parallel_degree)
        if any(device.is_cpu() for device in devices):
            _check_cpu_window(model)
        if model_config.weight_path and model_config.huggingface_weight_repo.repo_type == "local":
            check_tensors(decoder_tensors(read_headers(model_config.resolved_weight_paths()), model), model)
        cache_dtype = cache_dtype_for_encoding(encoding, model_config.kv_cache.kv_cache_format)
        return cls(
            **_flat_fields(model),
            model=model,
            plan=plan,
            max_seq_len=max_seq_len or model.max_position_embeddings,
            dtype=supported_encoding_dtype(encoding),
            quantization_encoding=encoding,
            model_quantization_encoding=None,
            quantization_config=None,
            kv_params=cls.construct_kv_params(
                huggingface_config, pipeline_config, devices, model_config.kv_cache, cache_dtype
            ),
            devices=devices,
            drafting_layers=drafting_layers(pipeline_config, model),
            use_subgraphs=model_config.use_subgraphs,
            data_parallel_degree=model_config.data_parallel_degree,
        )

    def set_outputs(self, return_logits: ReturnLogits, return_hidden_states: ReturnHiddenStates) -> None:
        """Fixes what the graph returns, which the pipeline decides after the configuration is made."""
        self.return_logits = return_logits
        self.return_hidden_states = return_hidden_states


def device_refs(model_config: MAXModelConfig) -> list[DeviceRef]:
    """The devices that the model is asked to run on."""
    return [DeviceRef(spec.device_type, spec.id) for spec in model_config.device_specs]


def _cache_dtype(dtype: DType, kv_cache: KVCacheConfig, device: DeviceRef) -> DType:
    """The type of keys and values, given the one that MAX takes for the encoding or from `--kv-cache-format`."""
    if not device.is_cpu() or dtype == DType.float32:
        return dtype
    if kv_cache.kv_cache_format is not None:
        raise ConfigError(
            f"--kv-cache-format: found {kv_cache.kv_cache_format}, expected float32 on a CPU, which attends in it. "
            "Leave the flag out."
        )
    return DType.float32


def _attention_kinds(layers: Sequence[LayerConfig]) -> dict[AttentionKind, tuple[AttentionConfig, int]]:
    """Each attention kind in use, in layer order, with a representative layer's attention and the number of layers."""
    kinds: dict[AttentionKind, tuple[AttentionConfig, int]] = {}
    for layer in layers:
        attention = layer.attention
        first, count = kinds.get(attention.kind, (attention, 0))
        if _cache_shape(first) != _cache_shape(attention):
            raise ConfigError(
                f"layer {layer.index}: KV heads, head_dim and window {_cache_shape(attention)}, but another "
                f"{attention.kind} layer has {_cache_shape(first)}; expected one shape per layer type"
            )
        kinds[attention.kind] = (first, count + 1)
    return kinds


def _cache_shape(attention: AttentionConfig) -> tuple[int, int, int | None]:
    return attention.num_key_value_heads, attention.head_dim, attention.sliding_window


def _check_cpu_window(model: ModelConfig) -> None:
    for layer in model.layers:
        window = layer.attention.sliding_window
        if window is not None and window < MINIMUM_CPU_WINDOW:
            raise ConfigError(
                f"sliding_window: found {window}, expected at least {MINIMUM_CPU_WINDOW} on a CPU (MAX's attention "
                "kernel takes no smaller one). Use --devices gpu or a checkpoint with a larger window."
            )


def _flat_fields(model: ModelConfig) -> dict[str, Any]:
    """The public flat fields, read back from the per-layer objects."""
    attentions = [layer.attention for layer in model.layers]
    full = next((a for a in attentions if a.kind is AttentionKind.FULL), attentions[0])
    sliding = next((a for a in attentions if a.kind is AttentionKind.SLIDING), full)
    ropes = [a.rope for a in attentions]
    scaled = {a.kind for a in attentions if a.rope is not None and a.rope.scaling is not None}
    scaling = next((rope.scaling for rope in ropes if rope is not None and rope.scaling is not None), None)
    moes = {layer.index: layer.mlp for layer in model.layers if isinstance(layer.mlp, MoEConfig)}
    moe = next(iter(moes.values()), None)
    mlps = [layer.mlp for layer in (*model.layers, *model.mtp_layers)]
    dense = next((mlp for mlp in mlps if isinstance(mlp, DenseMLPConfig)), None)
    shared = [layer.mlp.shared_expert if isinstance(layer.mlp, MoEConfig) else layer.mlp for layer in model.layers]
    fields: dict[str, Any] = dict(
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        num_hidden_layers=len(model.layers),
        num_attention_heads=full.num_attention_heads,
        num_key_value_heads=full.num_key_value_heads,
        num_attention_groups=full.num_key_value_heads,
        head_dim=full.head_dim,
        sliding_num_attention_heads=sliding.num_attention_heads,
        sliding_num_attention_groups=sliding.num_key_value_heads,
        layer_types=[str(a.kind) for a in attentions],
        per_layer_rope_theta=[rope.theta if rope is not None else 0.0 for rope in ropes],
        rope_theta=full.rope.theta if full.rope is not None else 0.0,
        partial_rotary_factors=[rope.rotary_dim / full.head_dim if rope is not None else 0.0 for rope in ropes],
        yarn_only_types=sorted(scaled),
        rope_scaling_params=_max_scaling(scaling),
        interleaved_rope_weights=False,
        intermediate_size=dense.intermediate_size if dense is not None else 0,
        use_head_wise_attn_gate=full.head_wise_gate,
        moe_layers=set(moes),
        swiglu_limits=[(moes[i].swiglu_limit or 0.0) if i in moes else 0.0 for i in range(len(model.layers))],
        swiglu_limits_shared=[mlp.swiglu_limit or 0.0 for mlp in shared],
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_word_embeddings,
        attention_multiplier=full.head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        clip_qkv=None,
    )
    if sliding.sliding_window is not None:
        fields["sliding_window"] = sliding.sliding_window
    if moe is not None:
        fields |= dict(
            moe_num_experts=moe.num_experts,
            moe_top_k=moe.top_k,
            moe_intermediate_size=moe.intermediate_size,
            share_expert_dim=moe.shared_expert.intermediate_size,
            moe_router_scaling_factor=moe.router_scaling_factor,
            norm_expert_weight=moe.normalize_weights,
        )
    return fields


def _max_scaling(scaling: Llama3Scaling | None) -> Llama3RopeScalingParams | None:
    if scaling is None:
        return None
    return Llama3RopeScalingParams(
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        orig_max_position=scaling.original_max_position_embeddings,
    )


def _hub_mapping(config: Step3p5Config) -> dict[str, Any]:
    """The flat fields in the spelling of `config.json`, for a configuration that was made without a checkpoint."""
    scaling = config.rope_scaling_params
    return dict(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers,
        num_nextn_predict_layers=0,
        max_position_embeddings=config.max_seq_len,
        num_attention_heads=config.num_attention_heads,
        num_attention_groups=config.num_attention_groups,
        head_dim=config.head_dim,
        attention_other_setting=dict(
            attention_type=str(AttentionKind.SLIDING),
            num_attention_heads=config.sliding_num_attention_heads,
            num_attention_groups=config.sliding_num_attention_groups,
            head_dim=config.head_dim,
        ),
        sliding_window=config.sliding_window,
        layer_types=config.layer_types,
        rope_theta=config.per_layer_rope_theta or config.rope_theta,
        partial_rotary_factors=config.partial_rotary_factors,
        rope_scaling=None
        if scaling is None
        else dict(
            rope_type="llama3",
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.orig_max_position,
        ),
        yarn_only_types=config.yarn_only_types,
        intermediate_size=config.intermediate_size,
        use_head_wise_attn_gate=config.use_head_wise_attn_gate,
        use_qk_norm=True,
        zero_centered=True,
        moe_layers_enum=sorted(config.moe_layers),
        moe_num_experts=config.moe_num_experts,
        moe_top_k=config.moe_top_k,
        moe_intermediate_size=config.moe_intermediate_size,
        share_expert_dim=config.share_expert_dim,
        moe_router_activation="sigmoid",
        moe_router_scaling_factor=config.moe_router_scaling_factor,
        norm_expert_weight=config.norm_expert_weight,
        use_moe_router_bias=True,
        need_fp32_gate=True,
        swiglu_limits=config.swiglu_limits,
        swiglu_limits_shared=config.swiglu_limits_shared,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        hidden_act="silu",
    )
