"""Keeps engines and libraries from talking over the progress bar, and from calling home. Import before they start."""

from __future__ import annotations

import logging
import os
import warnings

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}


def quiet() -> None:
    """Sets the environment for this process and those it starts; keeps warnings and errors of Flower."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in ("DEPRECATED", "Federated evaluation will be skipped"))
