"""A ComfyUI pack of one node: the model it is put on writes every call into the log, for host tests that count them."""

import logging


class LogCalls:
    INPUT_TYPES = classmethod(lambda _: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model):
        from comfy.patcher_extension import WrappersMP

        def call(executor, x, t, *args, **kwargs):
            options = kwargs.get("transformer_options") or args[3]
            logging.info("model call %s at %.4f", sorted(options["cond_or_uncond"]), float(t[0]))
            return executor(x, t, *args, **kwargs)

        patched = model.clone()
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "call_log", call)
        return (patched,)


NODE_CLASS_MAPPINGS = {"LogCalls": LogCalls}
