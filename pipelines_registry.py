"""What `max … --custom-architectures pipelines_registry` imports."""

import sys

from step3p5.arch import ARCHITECTURES

if "max.serve.api_server" in sys.modules:  # in `max serve`; other commands need not load the server
    from step3p5.api_routes import register_routes
    from step3p5.localhost import keep_to_localhost

    register_routes()
    keep_to_localhost()

__all__ = ["ARCHITECTURES"]
