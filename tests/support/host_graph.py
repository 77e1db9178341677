"""Workflows for host tests, built node by node, and the comparison of what they give."""

from __future__ import annotations

from torch import Tensor

SIDE_PX, STEPS, CFG, SEED = 64, 5, 4.0, 7


class Graph:
    """An API-format workflow with our loaders in it, built node by node."""

    def __init__(self):
        self.prompt = {}
        self.model = self.add("ErnieLoadDiffusionModel", model_name="ernie-image.safetensors", weight_dtype="fp32")
        self.clip = self.add("ErnieLoadTextEncoder", encoder_name="ministral-3-3b.safetensors", rope="yarn")
        self.vae = self.add("ErnieLoadVAE", vae_name="flux2-vae.safetensors", weight_dtype="fp32")
        self.positive = self.add("ErnieEncodePrompt", clip=self.clip, prompt="a red star")
        self.negative = self.add("ErnieEncodePrompt", clip=self.clip, prompt="")
        self.latent = self.add("ErnieEmptyLatent", size="custom", width=SIDE_PX, height=SIDE_PX, batch_size=1)

    def add(self, kind, /, **inputs):
        """Add a node; returns a link to its first output."""
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]

    def ernie_sampler(self, *, model=None, shift=4.0, **changes):
        settings = {
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "preset": "custom",
            "steps": STEPS,
            "cfg": CFG,
            "seed": SEED,
            "denoise": 1.0,
        }
        return self.add("ErnieSampler", model=model or self.model, shift=shift, **settings | changes)

    def ksampler(self, *, model=None, **changes):
        settings = {
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "steps": STEPS,
            "cfg": CFG,
            "seed": SEED,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        return self.add("KSampler", model=model or self.model, **settings | changes)

    def custom_sampler(self, sigmas, *, model=None, latent_image=None):
        return self.add(
            "SamplerCustomAdvanced",
            noise=self.add("RandomNoise", noise_seed=SEED),
            guider=self.add(
                "CFGGuider", model=model or self.model, positive=self.positive, negative=self.negative, cfg=CFG
            ),
            sampler=self.add("KSamplerSelect", sampler_name="euler"),
            sigmas=sigmas,
            latent_image=latent_image or self.latent,
        )


def difference(a: Tensor, b: Tensor) -> float:
    """The largest deviation, relative to the largest value; fails where there is nothing to compare."""
    assert a.shape == b.shape
    assert a.isfinite().all()
    assert a.std() > 1e-3, "the result is one number"
    return float((a - b).abs().max() / a.abs().max())


def defaults(nodes, kind, **given):
    """All widgets of a core node at their defaults, then `given`, less the inputs that this version does not have."""
    inputs = {}
    for group in ("required", "optional"):
        for name, spec in nodes[kind]["input"].get(group, {}).items():
            choices = spec[0] if isinstance(spec[0], list) else (spec[1] if len(spec) > 1 else {}).get("options")
            options = spec[1] if len(spec) > 1 else {}
            if "default" in options:
                inputs[name] = options["default"]
            elif choices:
                inputs[name] = choices[0]
            if name in given:
                inputs[name] = given[name]
    return inputs
