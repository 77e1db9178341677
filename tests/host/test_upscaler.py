"""Hires fix by an upscaler model on a real ComfyUI: core's upscaler nodes feed a tiled second pass."""

import pytest
import torch
import torch.nn.functional as F
from host_graph import Graph
from PIL import Image
from safetensors.torch import save_file

pytestmark = pytest.mark.host

SIDE_PX = 128  # the size the model in miniature was trained on
PROMPT = "a large red star in the center on a sky background"


def write_upscaler(path, *, channels=4, growth=32):
    """A file of ESRGAN's layout that doubles a picture by repeating its pixels: every number can be checked."""

    def conv(outputs, inputs, *, identity=False):
        weight = torch.zeros(outputs, inputs, 3, 3)
        if identity:
            weight[:, :, 1, 1] = torch.eye(outputs, inputs)
        return weight

    layers = {"model.0": conv(channels, 3, identity=True), "model.1.sub.1": conv(channels, channels)}
    for block in (1, 2, 3):
        for number in (1, 2, 3, 4, 5):
            outputs = growth if number < 5 else channels
            layers[f"model.1.sub.0.RDB{block}.conv{number}.0"] = conv(outputs, channels + (number - 1) * growth)
    layers |= {f"model.{number}": conv(channels, channels, identity=True) for number in (3, 5)}
    layers["model.7"] = conv(3, channels, identity=True)
    tensors = {f"{name}.weight": weight for name, weight in layers.items()}
    tensors |= {f"{name}.bias": torch.zeros(len(weight)) for name, weight in layers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def test_an_upscaler_models_picture_is_the_base_of_a_second_pass(server, images, need, pictures_folder):
    """VAEDecode, UpscaleModelLoader, ImageUpscaleWithModel, VAEEncode, and a tiled second pass, as hires_fix says."""
    need("UpscaleModelLoader", "ImageUpscaleWithModel")
    write_upscaler(server.base / "models" / "upscale_models" / "double.safetensors")
    graph = Graph()
    prompt = graph.add("ErnieEncodePrompt", clip=graph.clip, prompt=PROMPT)
    latent = graph.add("ErnieEmptyLatent", size="custom", width=SIDE_PX, height=SIDE_PX, batch_size=1)
    first = graph.add(
        "VAEDecode",
        samples=graph.ernie_sampler(positive=prompt, latent_image=latent, steps=20),
        vae=graph.vae,
    )
    upscaler = graph.add("UpscaleModelLoader", model_name="double.safetensors")
    larger = graph.add("ImageUpscaleWithModel", upscale_model=upscaler, image=first)
    second = graph.ernie_sampler(
        positive=prompt,
        latent_image=graph.add("VAEEncode", pixels=larger, vae=graph.vae),
        model=graph.add("ErnieTiledSampling", model=graph.model, tile=SIDE_PX, overlap=64),
        steps=20,
        denoise=0.2,
    )
    small, doubled, finished = images(graph, first, larger, graph.add("VAEDecode", samples=second, vae=graph.vae))
    assert (doubled - small.repeat_interleave(2, 0).repeat_interleave(2, 1)).abs().max() <= 1 / 255 + 1e-6
    assert finished.shape == (2 * SIDE_PX, 2 * SIDE_PX, 3)
    back = F.avg_pool2d(finished.permute(2, 0, 1), 2).permute(1, 2, 0)
    assert (back - small).abs().mean() < 0.05, "the second pass kept the picture"
    assert (finished - doubled).abs().mean() > 0.002, "and painted over it"
    for name, picture in (("first", small), ("doubled", doubled), ("second", finished)):
        Image.fromarray((picture * 255).round().byte().numpy()).save(pictures_folder / f"upscaler-{name}.png")
