"""Labels by a Python function of your own, named as "package.module:function" and importable where the stage runs.

The function is given a picture, uint8 [H, W, 3], and returns a dict with any of: category ("things/star"), confidence
(0..1), runner_up, description (a dict), captions (a dict of texts by length) or caption (one text, taken as the long
one). It must be pure: the same picture, the same answer. Only the command line offers it, where people run code of
theirs anyway; no node does.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ErnieError
from .answers import LENGTHS
from .categories import Assignment
from .manifest import Row


class OwnLabels:
    """Sorts and describes by a function."""

    def __init__(self, name: str):
        """Raises ErnieError: there is no such module or function."""
        self.name = name
        source = inspect.getsourcefile(self._function())
        content = Path(source).read_bytes() if source else b""
        self._key = hashlib.sha256(name.encode() + content).hexdigest()[:16]

    def _function(self) -> Callable[[np.ndarray], dict[str, Any]]:
        module, _, function = self.name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as e:
            raise ErnieError(f'a function is named as "package.module:function"; {self.name!r} is none: {e}.') from e

    def key(self) -> str:
        """Changes with the function's name and its file; what that imports is not looked at."""
        return self._key

    def _labels(self, picture: Image.Image) -> dict[str, Any] | ErnieError:
        made = self._function()(np.asarray(picture.convert("RGB")))
        if not isinstance(made, dict):
            return ErnieError(f"{self.name} must return a dict, got {type(made).__name__}.")
        return made

    def assign(self, pictures: Sequence[Image.Image]) -> list[Assignment | ErnieError]:
        answers: list[Assignment | ErnieError] = []
        for labels in map(self._labels, pictures):
            if isinstance(labels, ErnieError):
                answers.append(labels)
                continue
            answers.append(
                Assignment(
                    category=str(labels.get("category") or ""),
                    confidence=labels.get("confidence"),
                    runner_up=str(labels.get("runner_up") or ""),
                )
            )
        return answers

    def describe(self, rows: Sequence[Row], pictures: Sequence[Image.Image]) -> list[Row | ErnieError]:  # noqa: ARG002
        return [self._described(labels) for labels in map(self._labels, pictures)]

    def _described(self, labels: dict[str, Any] | ErnieError) -> Row | ErnieError:
        if isinstance(labels, ErnieError):
            return labels
        captions = dict(labels.get("captions") or {})
        if labels.get("caption"):
            captions.setdefault("long", labels["caption"])
        unknown = [length for length in captions if length not in LENGTHS]
        if unknown or not captions:
            given = f"captions of the lengths {', '.join(unknown)}" if unknown else "no caption"
            return ErnieError(f"{self.name} gave {given}; known are {', '.join(LENGTHS)}.")
        return {"description": dict(labels.get("description") or {}), "captions": captions, "caption_notes": []}
