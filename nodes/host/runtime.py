"""The process: its version, cancel, progress, memory."""

from __future__ import annotations

from typing import Any

import torch


def host_version() -> tuple[int, ...] | None:
    """(0, 33, 0) for ComfyUI 0.33.0; None when it does not say."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return None
    parts = __version__.split("+")[0].split("-")[0].split(".")
    return tuple(int(p) for p in parts if p.isdigit())


def throw_if_interrupted() -> None:
    """Raise the host's own exception when the user pressed cancel."""
    import comfy.model_management

    comfy.model_management.throw_exception_if_processing_interrupted()


def is_interrupted() -> bool:
    """Whether the user pressed cancel and `throw_if_interrupted` has not been called since."""
    import comfy.model_management

    return comfy.model_management.processing_interrupted()


def block_output() -> Any:
    """What an output holds when there is nothing to hand on yet: nodes behind it do not run."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)


def device() -> torch.device:
    """Where long computations outside a model run."""
    import comfy.model_management as mm

    return mm.get_torch_device()


def unload_models() -> None:
    """Give the accelerator's memory back, for another process to use."""
    import comfy.model_management as mm

    mm.unload_all_models()
    mm.soft_empty_cache()


def progress(total: int):
    """The host's progress bar: `.update_absolute(value, total, preview)`; preview = ("JPEG", PIL image, longest side)
    or None."""
    import comfy.utils

    return comfy.utils.ProgressBar(total)


def show_text(node_id: str | None, text: str) -> None:
    """Show `text` on the node while it runs."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None:
        server.send_progress_text(text, node_id)
