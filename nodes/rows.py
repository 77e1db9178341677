"""How a row becomes a picture: what Batch from Prompts and XY Grid have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ernie_core.errors import ErnieError
from . import host
from .sampling import preset_settings

# The official pipeline's; one seed, so that rows differ in what they say they differ in.
ENHANCER_SETTINGS = {"seed": 0, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(kw_only=True)
class Studio:
    """Models, and the last one that was patched or loaded for a row: rows come in an order that changes it least."""

    models: Sequence[Any]
    """The connected MODELs, first to last; None where there is none."""
    clip: Any
    vae: Any
    hidden: Any
    enhancer: Any = None
    max_new_tokens: int = 2048
    _key: tuple = ()
    _model: Any = None
    _written: dict[tuple, str] = field(default_factory=dict)

    def encode(self, text: str) -> list:
        host.throw_if_interrupted()
        return host.encode_prompt(self.clip, text)

    def write(self, row) -> str:
        """The text to encode: the prompt, or what the enhancer makes of it."""
        from .text import enhance

        if not row.enhance:
            return row.prompt
        key = (row.prompt, row.width, row.height)
        if key not in self._written:
            if self.enhancer is None:
                raise ErnieError(f"{row.label} asks for the enhancer, but none is connected.")
            settings = {**ENHANCER_SETTINGS, "max_new_tokens": self.max_new_tokens}
            self._written[key] = enhance(self.enhancer, *key, settings, self.hidden.unique_id)
        return self._written[key]

    def model(self, row):
        """The row's MODEL with its LoRAs."""
        from ..ernie_core.weights.lora import module_strengths, read_lora

        key = (row.checkpoint, row.variant, row.loras)
        if self._model is None or key != self._key:
            base = self._model if self._model is not None and key[:2] == self._key[:2] and not self._key[2] else None
            self._model = None  # frees a checkpoint before the next one is read
            model = self._base(row) if base is None else base
            for name, strength in row.loras:
                shapes = host.lora_shapes(model)
                lora = read_lora(host.lora_path(name), shapes)
                model = host.apply_lora(model, lora, module_strengths(lora, strength, "", shapes))
            self._key, self._model = key, model
        return self._model

    def _base(self, row):
        from ..ernie_core.weights.checkpoint import read_component

        if row.checkpoint:
            path = host.model_path("diffusion_models", row.checkpoint)
            return host.make_model(read_component(path, "transformer"), weight_dtype="default")
        model = self.models[row.variant - 1] if row.variant <= len(self.models) else None
        if model is None:
            raise ErnieError(f"{row.label} asks for model {row.variant}, which is not connected.")
        return model

    def generate(self, row, positive, negative):
        """One picture [H, W, 3] in [0, 1]."""
        from ..ernie_core.sampling.schedule import make_sigmas

        latent = host.sample(
            host.set_shift(self.model(row), row.shift),
            positive=positive,
            negative=negative,
            latent=host.empty_latent(row.width, row.height, 1),
            sigmas=make_sigmas(row.steps, shift=row.shift),
            cfg=row.cfg,
            seed=row.seed,
        )
        return host.decode(self.vae, latent)[0]

    def save(self, image, path, row) -> None:
        from ..ernie_core.batch import row_entries

        entries = row_entries(row) | ({"enhanced": self.write(row)} if row.enhance else {})
        self._save_png(image, path, {f"ernie_{name}": value for name, value in entries.items()})

    def save_sheet(self, image, path) -> None:
        """A labelled picture of pictures [H, W, 3] in [0, 1], with the workflow inside."""
        self._save_png(image, path, {})

    def _save_png(self, image, path, entries: dict[str, str]) -> None:
        prompt, extra = self.hidden.prompt, self.hidden.extra_pnginfo
        host.save_png(image, path, prompt=prompt, extra_pnginfo=extra, entries=entries)

    def announce(self, number: int, total: int, row) -> None:
        host.throw_if_interrupted()
        host.show_text(self.hidden.unique_id, f"{number} of {total} ({row.label}): {row.prompt[:80]}")

    def callbacks(self) -> dict[str, Any]:
        """What the engine's `run_rows` needs."""
        return {
            "encode": self.encode,
            "write": self.write,
            "generate": self.generate,
            "save": self.save,
            "on_row": self.announce,
        }


def default_row(*, preset: str, steps: int, cfg: float, prompt: str = "", **settings):
    """A row with the widgets' values."""
    from ..ernie_core.batch import Row

    steps, cfg = preset_settings(preset, steps, cfg)
    return Row(label="", prompt=prompt, steps=steps, cfg=cfg, **settings)
