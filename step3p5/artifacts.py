"""What artifacts compiled ahead were compiled for, so that a run asking for something else hears which setting differs.

MAX matches artifacts by the graph's name and signature, and says no more than that none fits; what the signature does
not show (the kernels' revision, the clamps) it does not compare. This record lies beside the artifacts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from max.pipelines.lib import PipelineConfig

from .custom_ops import compiled_kernels, use_kernels
from .kernel_package import compiled_package, kernels_path, sources_digest
from .model_config import Step3p5Config
from .speculation.draft_vocabulary import SIZE_VARIABLE, draft_vocabulary_size

logger = logging.getLogger("max.pipelines")

RECORD_NAME = "step3p5.json"


class ArtifactError(ValueError):
    """Artifacts do not fit the run; the message names the setting, both values and what to do."""


def artifact_settings(pipeline_config: PipelineConfig, config: Step3p5Config) -> dict[str, Any]:
    """What the compiled graphs depend on, by the flag or file that decides it. Values are JSON's."""
    return {
        "--quantization-encoding": config.quantization_encoding,
        "--devices (their number)": len(config.devices),
        "--ep-size": pipeline_config.runtime.ep_size,
        "--data-parallel-degree": config.data_parallel_degree,
        "--kv-cache-page-size": pipeline_config.model.kv_cache.kv_cache_page_size,
        "--use-subgraphs": config.use_subgraphs,
        "--speculative-method (MTP layers that draft)": len(config.drafting_layers),
        **_drafting_settings(config),
        "the returned logits": str(config.return_logits),
        "config.json (digest of what was parsed)": _digest(repr(config.model).encode()),
        "the Mojo kernels (digest)": sources_digest(kernels_path()),
        "the version of modular": version("modular"),
    }


def _drafting_settings(config: Step3p5Config) -> dict[str, Any]:
    """Of graphs that draft; artifacts of others say nothing of them."""
    return {SIZE_VARIABLE: draft_vocabulary_size(config.model)} if config.drafting_layers else {}


def record_or_check(pipeline_config: PipelineConfig, config: Step3p5Config) -> None:
    """Writes the record where artifacts are exported, and the compiled kernels; where they are loaded, compares it.

    Raises:
        ArtifactError: The artifacts were compiled for another setting.
    """
    runtime = pipeline_config.runtime
    settings = artifact_settings(pipeline_config, config)
    if runtime.export_mefs is not None:
        folder = Path(runtime.export_mefs)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_NAME).write_text(json.dumps(settings, indent=2) + "\n")
        for package in compiled_kernels():
            shutil.copy(package, folder)
    if runtime.precompiled_mefs is not None:
        check(Path(runtime.precompiled_mefs), settings)
        use_kernels(compiled_package(kernels_path(), Path(runtime.precompiled_mefs)))


def check(folder: Path, settings: dict[str, Any]) -> None:
    """Compares settings with the record in `folder`.

    Raises:
        ArtifactError: One differs; the message names the first.
    """
    file = folder / RECORD_NAME
    if not file.is_file():
        logger.warning("%s: no %s beside the artifacts, so their settings cannot be compared.", folder, RECORD_NAME)
        return
    recorded = json.loads(file.read_text())
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ArtifactError(
                f"--precompiled-mefs {folder}: found artifacts compiled with {name} {recorded.get(name)!r}, expected "
                f"{value!r} as in this run. Change the setting, or compile again: python -m step3p5.aot."
            )


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
