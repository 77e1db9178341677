"""A Ray cluster, joined or started here; Ray is an optional package."""

from __future__ import annotations

import logging
import os
from typing import Any

from .errors import ErnieError


def connect_ray(address: str | None, workers: int) -> tuple[Any, bool]:
    """(the module ray, whether this call connected it: whoever asked then calls `ray.shutdown`).

    Args:
        address: of a running cluster, "auto" for the one this machine belongs to; None or "" starts one here.
        workers: CPUs of one that is started here.

    Raises:
        ErnieError: Ray is not installed, or the cluster is not reached.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers otherwise
        import ray
    except ImportError as e:
        raise ErnieError("--engine ray needs the package ray: pip install ray.") from e
    if ray.is_initialized():
        return ray, False
    options = {} if address else {"num_cpus": max(1, workers), "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise ErnieError(
            f"no Ray cluster at {address} ({e}). Start one with `ray start --head`, or leave --address out."
        ) from e
    return ray, True
