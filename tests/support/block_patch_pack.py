"""A custom node pack for tests: patches single blocks as other packs do, through core's ModelPatcher alone."""

from __future__ import annotations

import logging


class LeaveBlockOut:
    """MODEL one of whose blocks hands on what it gets at every second call; says so in the log."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"model": ("MODEL",), "block": ("INT", {"default": 1})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model, block):
        patched = model.clone()
        calls = 0

        def replace(args, extra):
            nonlocal calls
            calls += 1
            left_out = calls % 2 == 0
            logging.info("block patch: call %d, %s", calls, "left out" if left_out else "run")
            return {"img": args["img"]} if left_out else extra["original_block"](args)

        patched.set_model_patch_replace(replace, "dit", "double_block", block)
        return (patched,)


NODE_CLASS_MAPPINGS = {"LeaveBlockOut": LeaveBlockOut}
