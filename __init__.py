"""ComfyUI entry point. Nothing of the host is imported until the host asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import make_extension

    return make_extension()
