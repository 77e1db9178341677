"""Labels for drawn scenes, measured on the pixels: category, description and captions of one picture.

For `python -m ernie_core.cli curate`, which takes them as `--function tiny.labels:label`: so the whole pipeline runs
on pictures of the tiny model's world with labels that say what is drawn, without any model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .measure import measure
from .scenes import Scene, canonical_caption, named_facts


def label(picture: np.ndarray) -> dict[str, Any]:
    """Labels of a picture, uint8 [H, W, 3]; the confidence is the overlap with the drawn shape, 0..1.

    A picture without one clear object gets the category "no object" and a caption of its background.
    """
    found = measure(picture)
    if found.shape is None or found.color is None or found.size is None or found.place is None:
        text = f"a {found.background} background"
        return {"category": "no object", "confidence": 0.0, "caption": text, "description": {"scene": text}}
    scene = Scene(
        shape=found.shape,
        color=found.color,
        size=found.size,
        place=found.place,
        background=found.background,
        style=found.style,
    )
    text = canonical_caption(scene)
    short = f"{scene.color} {scene.shape}"
    return {
        "category": f"{scene.shape}/{scene.color}",
        "confidence": round(float(found.shape_overlap), 4),
        "description": {
            "type": "drawn scene",
            "subject": f"{scene.size} {short}",
            "scene": f"{scene.background} background",
            "style": scene.style,
            "layout": scene.place,
        },
        "captions": {
            "long": f"{text[0].upper()}{text[1:]}.",
            "medium": text,
            "short": short,
            "tags": ", ".join(named_facts(scene).values()),
            "prompt": short,
        },
    }
