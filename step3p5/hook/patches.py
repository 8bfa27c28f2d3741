"""What the hook changes in MAX: one function a module, called once the module has been executed.

Each replaces one entry point by a wrapper that hands on what does not concern this package untouched. Nothing of MAX or
transformers is imported here but by the wrappers, once MAX itself has been.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import PurePath
from types import ModuleType
from typing import Any

from step3p5.hook.short_name import SHORT_NAME, resolve

ASKED_FOR: set[str] = set()
"""The checkpoints that this process was told to run with this package, by the short name or the flag."""

logger = logging.getLogger("max.pipelines")

REGISTRY = "pipelines_registry"
"""The module that `--custom-architectures` names for this package."""

CONFIG_MODULE = "step3p5.model_config"
"""Where the configuration class of this package's architectures lies."""


def patch_pipeline_args(module: ModuleType) -> None:
    """`PipelineArgs`: takes the model name `step3p5`, and imports this package before `config.json` is read.

    MAX's commands, `AutoModel` and `LLM` all make their arguments here.
    """
    args = module.PipelineArgs
    from_flat_kwargs = args.from_flat_kwargs.__func__
    init = args.__init__

    @classmethod  # type: ignore[misc]  # becomes one of `args`
    @wraps(from_flat_kwargs)
    def import_first(cls: Any, **kwargs: Any) -> Any:
        if any(map(_names_this_package, kwargs.get("custom_architectures") or ())):
            _import_architectures(kwargs["custom_architectures"])
            ASKED_FOR.add(kwargs.get("model_path") or "")
        elif kwargs.get("model_path") == SHORT_NAME and not kwargs.get("model"):
            # As a recipe's section, it gets to `__init__` unread and merged with the recipe given.
            kwargs["model"] = {"model_path": kwargs.pop("model_path")}
        return from_flat_kwargs(cls, **kwargs)

    @wraps(init)
    def take_short_name(self: Any, **data: Any) -> None:
        path = resolve(data.get("model_path"))
        if path is not None:
            ASKED_FOR.add(path)
            data = _with_defaults(data, path, module.PipelineRuntimeConfig)
        init(self, **data)
        if any(map(_names_this_package, self.runtime.custom_architectures)):  # of a recipe, which is read here
            ASKED_FOR.add(self.model_path)

    args.from_flat_kwargs = import_first
    args.__init__ = take_short_name


def patch_auto_model(module: ModuleType) -> None:
    """`AutoTokenizer`: takes the model name `step3p5`, as `AutoModel` does through its `PipelineArgs`."""
    tokenizer = module.AutoTokenizer
    init = tokenizer.__init__

    @wraps(init)
    def take_short_name(self: Any, model_path: str, **kwargs: Any) -> None:
        init(self, resolve(model_path) or model_path, **kwargs)

    tokenizer.__init__ = take_short_name


def patch_hf_config(module: ModuleType) -> None:
    """`load_huggingface_config`: a Step-3.5 `config.json` that cannot be read ends in this package's error."""
    load = module.load_huggingface_config

    @wraps(load)
    def load_or_explain(repo: Any) -> Any:
        from step3p5.hook.config_file import check_config_file

        asked_for = repo.repo_id in ASKED_FOR and repo.subfolder is None
        try:
            config = load(repo)
        except Exception:
            check_config_file(repo, asked_for)
            raise
        if asked_for:
            check_config_file(repo, asked_for)
        return config

    module.load_huggingface_config = load_or_explain  # type: ignore[attr-defined]


def patch_pipeline_config(module: ModuleType) -> None:
    """`PipelineConfig`: weights that this package cannot run end in its error, that of the flag or of the tensor."""
    config = module.PipelineConfig
    resolve_weights = config._model_with_resolved_weights

    @staticmethod  # type: ignore[misc]  # becomes one of `config`
    @wraps(resolve_weights)
    def resolve_or_explain(model: Any, arch: Any) -> Any:
        try:
            return resolve_weights(model, arch)
        except ValueError:
            if arch.config.__module__ == CONFIG_MODULE:
                from step3p5.hook.weight_choice import check_weight_choice

                check_weight_choice(model, arch.supported_encodings)
            raise

    config._model_with_resolved_weights = resolve_or_explain


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "max.pipelines.lib.pipeline_args": patch_pipeline_args,
    "max.pipelines.lib.auto_model": patch_auto_model,
    "max.pipelines.lib._hf_config": patch_hf_config,
    "max.pipelines.lib.config.config": patch_pipeline_config,
}


def patch(module: ModuleType) -> None:
    """Changes one of the modules of `PATCHES`; says so and leaves it as it is where this MAX has it otherwise."""
    try:
        PATCHES[module.__name__](module)
    except AttributeError as error:
        logger.warning("--model %s is not available: this is not the MAX that it was made for (%s)", SHORT_NAME, error)


def _with_defaults(data: dict[str, Any], path: str, runtime_config: type[Any]) -> dict[str, Any]:
    """The arguments `data` for the checkpoint `path`, served under the short name with this package's architecture."""
    runtime = data.get("runtime") or {}
    if isinstance(runtime, runtime_config):
        runtime = {name: getattr(runtime, name) for name in runtime.model_fields_set}
    architectures = list(runtime.get("custom_architectures") or ())
    if not any(map(_names_this_package, architectures)):
        architectures.append(REGISTRY)
    _import_architectures(architectures)
    return data | {
        "model_path": path,
        "served_model_name": data.get("served_model_name") or SHORT_NAME,
        "runtime": {**runtime, "custom_architectures": architectures},
    }


def _import_architectures(specs: Sequence[str]) -> None:
    """What MAX does with `--custom-architectures`, once; later in its own order of things."""
    from max.pipelines.lib.arch_lookup import import_custom_architectures

    import_custom_architectures(list(specs))


def _names_this_package(spec: str) -> bool:
    return PurePath(spec.rpartition(":")[2]).name == REGISTRY
