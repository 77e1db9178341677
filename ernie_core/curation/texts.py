"""Every text that a manifest's row has of its picture, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training.captions import DEFAULT_STYLE, Caption
from .manifest import Row


def row_captions(row: Row, styles: Sequence[str] = ()) -> list[Caption]:
    """The captions of a row, by style: what stood beside it ("caption"), described ("long", ...), rewritten. Each once.

    Args:
        styles: only these, in this order; empty = all. A name that no row has is not an error here.
    """
    by_style: list[tuple[str, Any]] = [(DEFAULT_STYLE, row.get("caption"))]
    for column in ((row.get("given") or {}).get("captions"), row.get("captions"), row.get("prompts")):
        by_style += column.items() if isinstance(column, dict) else [(DEFAULT_STYLE, column)]
    found = [
        Caption(str(style).lower(), text.strip())
        for style, texts in by_style
        for text in (texts if isinstance(texts, list) else [texts])
        if isinstance(text, str) and text.strip()
    ]
    found = list(dict.fromkeys(found))
    return [c for style in styles for c in found if c.style == style.lower()] if styles else found
