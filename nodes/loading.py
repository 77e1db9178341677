"""Loader nodes: files and official folders become MODEL, CLIP, VAE and ERNIE_ENHANCER."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from . import host

CATEGORY = "ERNIE/loaders"
Enhancer = io.Custom("ERNIE_ENHANCER")

WEIGHT_DTYPES = ("default", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
VAE_DTYPES = ("default", "bf16", "fp32")
ROPES = ("yarn", "plain")

ROPE_TOOLTIP = (
    "Position encoding of the text encoder. yarn: as the model was trained and as the official pipeline runs. "
    "plain: what ComfyUI's own CLIPLoader computes; choose it to repeat a picture made with core nodes."
)
WEIGHT_TOOLTIP = (
    "Storage type of the weights. default: as the file has them, or what the device computes in. fp8 halves the memory "
    "and costs some quality. fp32 is for CPUs and comparisons."
)


class ErnieLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadDiffusionModel",
            display_name="Load Diffusion Model (ERNIE)",
            category=CATEGORY,
            description="Loads an ERNIE-Image transformer of any size from one file or from an official folder.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_models("diffusion_models"),
                    tooltip="A file from models/diffusion_models, or a folder in the official layout (ends with /).",
                ),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=WEIGHT_TOOLTIP),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="ERNIE-Image transformer with the official sampling shift 4."
                )
            ],
        )

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("diffusion_models", model_name), "transformer")
        return io.NodeOutput(host.make_model(component, weight_dtype=weight_dtype))


class ErnieLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadTextEncoder",
            display_name="Load Text Encoder (ERNIE)",
            category=CATEGORY,
            description="Loads the Ministral-3 text encoder of ERNIE-Image from one file or from an official folder.",
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=host.list_models("text_encoders"),
                    tooltip="A file from models/text_encoders, or a folder in the official layout (ends with /).",
                ),
                io.Combo.Input("rope", options=list(ROPES), default="yarn", tooltip=ROPE_TOOLTIP),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="Text encoder for Encode Prompt or CLIPTextEncode.")],
        )

    @classmethod
    def execute(cls, encoder_name: str, rope: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("text_encoders", encoder_name), "text_encoder")
        return io.NodeOutput(host.make_clip(component, rope=rope))


class ErnieLoadPromptEnhancer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadPromptEnhancer",
            display_name="Load Prompt Enhancer (ERNIE)",
            category=CATEGORY,
            description="Loads the language model that turns a short prompt into a detailed one.",
            inputs=[
                io.Combo.Input(
                    "enhancer_name",
                    options=host.list_models("text_encoders"),
                    tooltip="A file from models/text_encoders, or a folder in the official layout (ends with /).",
                ),
            ],
            outputs=[Enhancer.Output(display_name="enhancer", tooltip="Prompt enhancer for Enhance Prompt.")],
        )

    @classmethod
    def execute(cls, enhancer_name: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("text_encoders", enhancer_name), "enhancer")
        return io.NodeOutput(host.make_enhancer(component))


class ErnieLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadVAE",
            display_name="Load VAE (ERNIE)",
            category=CATEGORY,
            description="Loads the FLUX.2 VAE of ERNIE-Image from one file or from an official folder.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=host.list_models("vae"),
                    tooltip="A file from models/vae, or a folder in the official layout (ends with /).",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(VAE_DTYPES),
                    default="default",
                    tooltip="Type the VAE computes in. default: bf16 where the device is fast at it, else fp32. "
                    "fp32 needs twice the memory and changes pixels by about one 8-bit step.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="VAE for VAEDecode, VAEEncode and their tiled kin.")],
        )

    @classmethod
    def execute(cls, vae_name: str, weight_dtype: str) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        component = read_component(host.model_path("vae", vae_name), "vae")
        return io.NodeOutput(host.make_vae(component, weight_dtype=weight_dtype))


def list_official_folders() -> list[str]:
    """Complete official folders among the host's models, then the repositories that can be downloaded."""
    from ..ernie_core.weights.download import REPOSITORIES

    found = [
        name
        for name in host.list_models("diffusion_models")
        if name.endswith("/") and (host.model_path("diffusion_models", name) / "model_index.json").is_file()
    ]
    return [*found, *REPOSITORIES]


class ErnieLoadImageModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ErnieLoadImageModel",
            display_name="Load ERNIE-Image",
            category=CATEGORY,
            description="Loads transformer, text encoder, VAE and prompt enhancer of one official folder at once.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list_official_folders(),
                    tooltip="A folder in the official layout (ends with /), or the name of an official repository: "
                    "its folder is used when it was downloaded before.",
                ),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", tooltip=WEIGHT_TOOLTIP),
                io.Combo.Input("rope", options=list(ROPES), default="yarn", tooltip=ROPE_TOOLTIP),
                io.Boolean.Input(
                    "load_enhancer",
                    default=False,
                    tooltip="Also load the prompt enhancer (6.9 GB more for the released model). Off: the enhancer "
                    "output "
                    "is empty.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="Fetch the official files from Hugging Face when they are not there. Off (neutral): "
                    "nothing is "
                    "ever downloaded; the error says how big the download would be and where it would go.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="ERNIE-Image transformer."),
                io.Clip.Output(display_name="clip", tooltip="Text encoder."),
                io.Vae.Output(display_name="vae", tooltip="FLUX.2 VAE."),
                Enhancer.Output(display_name="enhancer", tooltip="Prompt enhancer; empty when load_enhancer is off."),
            ],
        )

    @classmethod
    def execute(cls, folder: str, weight_dtype: str, rope: str, load_enhancer: bool, download: bool) -> io.NodeOutput:
        from ..ernie_core.weights.checkpoint import read_component

        kinds = ("transformer", "text_encoder", "vae", *(["enhancer"] if load_enhancer else []))
        path = find_folder(folder, kinds, download=download)
        parts = {kind: read_component(path, kind) for kind in kinds}  # all are checked before one is built
        model = host.make_model(parts["transformer"], weight_dtype=weight_dtype)
        clip = host.make_clip(parts["text_encoder"], rope=rope)
        vae = host.make_vae(parts["vae"], weight_dtype="default")
        enhancer = host.make_enhancer(parts["enhancer"]) if load_enhancer else None
        return io.NodeOutput(model, clip, vae, enhancer)


def find_folder(name: str, kinds: tuple[str, ...], *, download: bool) -> Path:
    """The official folder that `name` stands for; a repository is fetched when it is not there and `download` is on."""
    from ..ernie_core.weights.download import find_or_download, is_present

    if name.endswith("/"):
        return host.model_path("diffusion_models", name)
    ending = f"/{name.rpartition('/')[2]}/"
    for entry in host.list_models("diffusion_models"):
        if f"/{entry}".endswith(ending):
            path = host.model_path("diffusion_models", entry)
            if all(is_present(path, kind) for kind in kinds):
                return path
    bar = host.progress(1)

    def report(done: int, total: int, _file: str) -> None:
        host.throw_if_interrupted()
        bar.update_absolute(done, total)

    return find_or_download(name, host.models_folder(), kinds=kinds, confirm=download, on_progress=report)
