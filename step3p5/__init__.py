"""Step-3.5-Flash for MAX: the public classes, loaded on first use so that small tools start without the engine."""

# Every Python that starts where this package is installed reads this file: it imports nothing, not even `__future__`.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .model import Step3p5Inputs, Step3p5Model
    from .model_config import Step3p5Config
    from .pretrained_config import Step3p5PretrainedConfig

__all__ = ["Step3p5Config", "Step3p5Inputs", "Step3p5Model", "Step3p5PretrainedConfig"]

_MODULES = {
    "Step3p5Config": "model_config",
    "Step3p5Inputs": "model",
    "Step3p5Model": "model",
    "Step3p5PretrainedConfig": "pretrained_config",
}


def __getattr__(name: str) -> "Any":
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
