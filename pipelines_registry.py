"""What `max … --custom-architectures pipelines_registry` imports."""

from step3p5.arch import ARCHITECTURES

__all__ = ["ARCHITECTURES"]
