"""Registers the architecture with MAX, in place of the built-in one of the same name."""

from __future__ import annotations

from max.graph.weights import WeightsFormat
from max.pipelines.context import TextContext
from max.pipelines.lib import SupportedArchitecture
from max.pipelines.modeling.types import PipelineTask

from .batch_processor import Step3p5BatchProcessor
from .kernel_checks import check_own_kernels_once
from .mailboxes import MemoryPlanner
from .model import Step3p5Model
from .model_config import Step3p5Config
from .parsers import PARSER_NAME
from .pipelines import Step3p5Pipeline
from .precision import allow_bfloat16_on_cpus
from .speculation.arch import mtp_speculator
from .tokenizer import Step3p5Tokenizer
from .weight_adapters import convert_safetensor_state_dict

allow_bfloat16_on_cpus()
check_own_kernels_once()

step3p5_arch = SupportedArchitecture(
    name="Step3p5ForCausalLM",
    example_repo_ids=["stepfun-ai/Step-3.5-Flash"],
    default_encoding=Step3p5Config.DEFAULT_ENCODING,
    supported_encodings=Step3p5Config.SUPPORTED_ENCODINGS,
    pipeline_model=Step3p5Model,
    task=PipelineTask.TEXT_GENERATION,
    tokenizer=Step3p5Tokenizer,
    context_type=TextContext,
    default_weights_format=WeightsFormat.safetensors,
    weight_adapters={WeightsFormat.safetensors: convert_safetensor_state_dict},
    config=Step3p5Config,
    batching=Step3p5BatchProcessor,
    multi_gpu_supported=True,
    memory_planner=MemoryPlanner,
    pipeline_cls=Step3p5Pipeline,
    reasoning_parser=PARSER_NAME,
    tool_parser=PARSER_NAME,
    required_arguments={"emit_reasoning_content": True},  # the field that this model's clients read
)

ARCHITECTURES = [step3p5_arch, mtp_speculator(step3p5_arch)]
