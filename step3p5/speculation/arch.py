"""Registers the speculator beside the architecture: `--speculative-method mtp`."""

from __future__ import annotations

from dataclasses import replace

from max.pipelines.lib.arch_lookup import Speculator, SupportedArchitecture

from .depth import requested_depth
from .model import SpeculativeStep3p5Model
from .pipeline import SpeculativePipeline


def mtp_speculator(architecture: SupportedArchitecture) -> Speculator:
    """The speculator of `architecture`.

    MAX's own speculative pipeline is built on its overlap scheduler, which takes no CPU; this one brings its own.
    """
    base = replace(
        architecture,
        pipeline_cls=SpeculativePipeline,
        supports_overlap_scheduler=False,
        supports_device_graph_capture=False,
    )
    return Speculator(
        name="SpeculativeStep3p5ForCausalLM",
        base=base,
        draft_arch=None,
        method="mtp",
        pipeline_model=SpeculativeStep3p5Model,
        checkpoint_draft_width=requested_depth,
    )
