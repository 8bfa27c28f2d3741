"""MAX's structured output on a CPU, and over prompts that are read in pieces.

`PipelineConfig.from_args` refuses `--enable-structured-output` for CPU models, although the sampler that takes a
grammar's bitmask runs there: MAX itself uses it for `tool_choice`, which needs no flag. So the option is set here,
after the configuration was made and before the worker process gets its copy of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from max.pipelines.context import TextContext
from max.pipelines.lib import PipelineConfig

_logger = logging.getLogger(__name__)


def allow_on_cpu(pipeline_config: PipelineConfig) -> None:
    """Lets requests state a `response_format` where the flag that would let them is refused."""
    if pipeline_config.model.default_device_spec.device_type != "cpu":
        return
    # The sampling configuration is frozen, and what holds it cannot be handed another.
    object.__setattr__(pipeline_config.sampling, "enable_structured_output", True)
    _logger.info("structured output is on: MAX refuses --enable-structured-output on a CPU, this architecture does not")


def restart_grammars_amid_prompts(batch: Iterable[TextContext]) -> None:
    """Takes away the matchers of requests whose prompt goes on after this step; MAX builds them anew in the next one.

    A step that reads a piece of a prompt draws a token, too, which is thrown away. MAX's plain pipeline advances the
    request's grammar by it nevertheless, so that a forced call lacks its beginning, or a thought seems to have ended.
    """
    for context in batch:
        if context.tokens.actively_chunked and context.matcher is not None:
            context.set_matcher(None)  # as before the first step
