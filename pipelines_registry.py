"""What `max … --custom-architectures pipelines_registry` imports."""

import sys

from step3p5.arch import ARCHITECTURES

if "max.serve.api_server" in sys.modules:  # in `max serve`; other commands need not load the server
    from step3p5.api_routes import register_routes

    register_routes()

__all__ = ["ARCHITECTURES"]
