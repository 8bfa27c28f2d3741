"""MAX's structured output on a CPU.

`PipelineConfig.from_args` refuses `--enable-structured-output` for CPU models, although the sampler that takes a
grammar's bitmask runs there: MAX itself uses it for `tool_choice`, which needs no flag. So the option is set here,
after the configuration was made and before the worker process gets its copy of it.
"""

from __future__ import annotations

import logging

from max.pipelines.lib import PipelineConfig

_logger = logging.getLogger(__name__)


def allow_on_cpu(pipeline_config: PipelineConfig) -> None:
    """Lets requests state a `response_format` where the flag that would let them is refused."""
    if pipeline_config.model.default_device_spec.device_type != "cpu":
        return
    # The sampling configuration is frozen, and what holds it cannot be handed another.
    object.__setattr__(pipeline_config.sampling, "enable_structured_output", True)
    _logger.info("structured output is on: MAX refuses --enable-structured-output on a CPU, this architecture does not")
