"""A custom node pack for tests: scores pictures while the memory manager is told that there is room for so much only.

On a CPU ComfyUI loads everything in full; here its own partial loading is called with a budget, on the CPU, so that
layers which it leaves behind are brought by themselves as on a small card. Then everything that belongs on the card is
sent to the meta device, which stands for one, to see what would stay behind.
"""

from __future__ import annotations

import json
from unittest.mock import patch

import torch


class ScoreWithSmallBudget:
    """JSON: scores of all pictures, and how many bytes and layers were loaded of how many."""

    INPUT_TYPES = classmethod(
        lambda _: {"required": {"scorer": ("ERNIE_SCORER",), "image": ("IMAGE",), "share": ("FLOAT", {})}}
    )
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "score"
    CATEGORY = "test"

    def score(self, scorer, image, share):
        import comfy.model_management as mm

        loaded = []

        def load(models, device=None, **_):
            patcher = models[0]
            if not loaded:
                patcher.detach()
                patcher.partially_load(device or patcher.load_device, share * patcher.model_size())
                loaded.append(patcher)

        with patch.object(mm, "load_models_gpu", load):
            values = scorer.score(image)
        patcher = loaded.pop()
        casting = [m for m in scorer.network.modules() if hasattr(m, "comfy_cast_weights")]
        kinds = sorted({type(m).__name__ for m in casting})
        report = {
            "values": values,
            "bytes": patcher.loaded_size(),
            "of": patcher.model_size(),
            "layers": sum(bool(getattr(m, "comfy_patched_weights", False)) for m in casting),
            "all": len(casting),
            "kinds": kinds,
        }
        home = [(m, dict(m._parameters), dict(m._buffers)) for m in scorer.network.modules()]
        card = torch.device("meta")
        with patch.object(patcher, "load_device", card), patch.object(mm, "load_models_gpu", lambda m: load(m, card)):
            scorer._bring()
        tensors = [(hasattr(m, "comfy_cast_weights"), t) for m in scorer.network.modules() for t in own(m)]
        report["left"] = sum(not t.is_meta for casts, t in tensors if not casts)
        report["streamed"] = sum(not t.is_meta for casts, t in tensors if casts)
        report["held"] = sum(t.is_meta for casts, t in tensors if casts)
        for module, parameters, buffers in home:  # the scorer is in ComfyUI's cache
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        patcher.detach()
        return {"ui": {"text": [json.dumps(report)]}}


def own(module):
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


NODE_CLASS_MAPPINGS = {"ScoreWithSmallBudget": ScoreWithSmallBudget}
