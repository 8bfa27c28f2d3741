"""Keeps a server of this package to localhost unless it is told otherwise; MAX's own default is every address."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

LOCALHOST = "127.0.0.1"
ENTRY = "max._entrypoints.cli.serve.serve_api_and_model_worker"
"""The module behind `max serve`: imports this package by its `--custom-architectures`, then binds its address."""

logger = logging.getLogger("max.pipelines")


def keep_to_localhost() -> None:
    """Changes the address of the server that this process is about to start; once.

    `--host`, `MAX_SERVE_HOST` and a `.env` file have their way. `/metrics` keeps to the same address.
    """
    entry = sys.modules.get(ENTRY)
    if entry is None:
        return
    try:
        _change_default(entry)
    except AttributeError as error:
        logger.warning("the server may listen on every address: give --host (not the MAX it was made for: %s)", error)


def _change_default(entry: ModuleType) -> None:
    configure: Callable[..., Any] = entry.fastapi_config
    if hasattr(configure, "__wrapped__"):
        return

    @wraps(configure)
    def configure_localhost(app: Any, server_settings: Any) -> Any:
        if "host" not in server_settings.model_fields_set:
            server_settings.host = LOCALHOST
            logger.info("the server listens on %s alone; --host 0.0.0.0 opens it to every address", LOCALHOST)
        return configure(app=app, server_settings=server_settings)

    entry.fastapi_config = configure_localhost  # type: ignore[attr-defined]
