"""The objectives as the trainer calls them: what a micro-batch costs, what is logged, what must be saved.

All ask the model through one function, `velocity(x_BCHW, sigmas_B, texts, view, attend)`, which runs it with the
adapters of `view` on; where the gradient goes is decided by torch's grad mode at the call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..model.attention import AttentionFunction, attention
from ..sampling.latents import mix_noise
from .blocks import OnBlock
from .feed import Batch
from .learner import Learner
from .objectives import (
    AutoBeta,
    dpo_loss,
    draw_noise,
    draw_sigmas,
    keyword_attention,
    loss_weights,
    make_generator,
    sft_loss,
)
from .recipe import Recipe
from .world import Sums

View = tuple[str | Mapping[str, float], ...]
"""What `Views.active` takes: names of adapters, or {name: strength}; () = the base."""


class Velocity(Protocol):
    """velocity(x_BCHW, sigmas_B, texts, view, attend): the model's answer with the adapters of `view` on."""

    def __call__(
        self,
        x: Tensor,
        sigmas: Tensor,
        texts: Sequence[Tensor],
        view: View,
        attend: AttentionFunction,
        *,
        on_block: OnBlock | None = None,
    ) -> Tensor: ...


ALARM_STEPS = 50
"""Steps in a row with the winner's error above the reference's before the alarm."""
_SIGMA_BINS = 4
# Without a gradient the fastest kernel may be another one, and then the reference would differ from the policy by
# rounding before anything is learnt.
_same_kernel = partial(attention, backend="sdpa")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One update within a step."""

    step: int
    learner: str = "policy"
    """Which adapter it changes."""
    index: int = 0
    """Which of the step's updates of this adapter."""

    @property
    def suffix(self) -> str:
        """What tells the metrics of other adapters from the policy's."""
        return "" if self.learner == "policy" else f"_{self.learner}"

    @property
    def loss(self) -> str:
        return f"loss{self.suffix}"


class Objective(Protocol):
    """What the trainer needs of an objective; most train the policy alone, once in a step, and carry no state."""

    metric_names: tuple[str, ...]
    learners: Mapping[str, Learner] = {}
    """What is trained besides the policy; saved and resumed with it."""
    done: bool = False
    """Whether training has come to its end before its last step."""

    def turns(self, step: int) -> Sequence[Turn]:
        """The updates of a step, in order."""
        return (Turn(step=step),)

    def losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:
        """Loss [B] of each sample, with its gradient; metrics are added to `sums`."""
        ...

    def after_step(self, metrics: Mapping[str, float]) -> str | None:  # noqa: ARG002
        """Take in the means of a finished step; an alarm for the user, once."""
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""


class Sft(Objective):
    """Supervised fine-tuning: velocity matching on each picture under its caption."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.metric_names = tuple(map(_bin_name, range(_SIGMA_BINS)))

    def losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:  # noqa: ARG002
        assert batch.latents_BCHW is not None
        recipe, x0 = self.recipe, batch.latents_BCHW
        tokens = x0[0, 0].numel()
        sigmas = torch.cat([_sigma(recipe, number, tokens) for number in batch.numbers])
        noise = torch.stack([draw_noise(x0.shape[1:], seed=recipe.seed, number=n) for n in batch.numbers])
        attend = attention
        if any(columns is not None for columns in batch.keyword_columns):
            attend = keyword_attention(batch.keyword_columns, recipe.keyword_weight, tokens)
        x = mix_noise(x0, noise, sigmas[:, None, None, None])
        predicted = velocity(x, sigmas, batch.texts, ("policy",), attend)
        place = predicted.device
        errors = sft_loss(
            predicted, (noise - x0).to(place), _on(batch.masks_BHW, place), region=_on(batch.regions_BHW, place)
        )
        bins = (sigmas * _SIGMA_BINS).long().clamp(max=_SIGMA_BINS - 1)
        for i in range(_SIGMA_BINS):
            sums.add(_bin_name(i), errors.detach()[(bins == i).to(place)])
        weights = loss_weights(recipe.sigmas, sigmas, tokens=tokens) * batch.weights_B
        return errors * weights.to(place)


class Dpo(Objective):
    """Preference learning: winner and loser under one caption, one noise and one sigma, against a frozen reference.

    With `reference_bank` K every pair meets K fixed draws of noise and sigma, and the reference's errors on them are
    computed once and kept in `errors_path`, one JSON line each.
    """

    metric_names = (
        *("preference", "margin", "margin_size", "accuracy", "negative_margin", "gradient_factor", "beta"),
        *("win_error", "lose_error", "win_excess", "lose_excess", "win_alarm", "safeguard"),
    )

    def __init__(self, recipe: Recipe, *, reference: tuple[str, ...], errors_path: Path):
        self.recipe, self.reference, self.errors_path = recipe, reference, errors_path
        target = recipe.dpo.auto_beta
        self.auto_beta = None if target is None else AutoBeta(target=target)
        self.win_excess, self.steps_above = 0.0, 0
        self.known = _read_errors(errors_path) if recipe.reference_bank else {}

    def losses(self, batch: Batch, velocity: Velocity, sums: Sums, turn: Turn) -> Tensor:  # noqa: ARG002
        config = self.recipe.dpo
        assert batch.latents_BCHW is not None
        assert batch.lose_BCHW is not None
        x0, pairs = torch.cat([batch.latents_BCHW, batch.lose_BCHW]), len(batch.numbers)
        elements, tokens = x0[0].numel(), x0[0, 0].numel()
        draws = [self._draw(k, n, x0.shape[1:], tokens) for k, n in zip(batch.keys, batch.numbers, strict=True)]
        noise = torch.stack([noise for _, noise, _ in draws]).repeat(2, 1, 1, 1)
        sigmas = torch.cat([sigma for _, _, sigma in draws]).repeat(2)
        texts = (*batch.texts, *batch.texts)
        x = mix_noise(x0, noise, sigmas[:, None, None, None])

        predicted = velocity(x, sigmas, texts, ("policy",), _same_kernel)
        place = predicted.device
        target = (noise - x0).to(place)
        masks = None if batch.masks_BHW is None else batch.masks_BHW.repeat(2, 1, 1).to(place)

        def reference_errors() -> Tensor:
            with torch.no_grad():
                return sft_loss(velocity(x, sigmas, texts, self.reference, _same_kernel), target, masks)

        reference = self._recall([name for name, _, _ in draws], reference_errors).to(place)
        errors = sft_loss(predicted, target, masks)
        residuals = (predicted.detach().float() - target).chunk(2)
        loss, metrics = dpo_loss(
            errors[:pairs],
            errors[pairs:],
            reference[:pairs],
            reference[pairs:],
            config,
            beta=None if self.auto_beta is None else self.auto_beta.beta(config, elements=elements),
            elements=elements,
            residual_win=residuals[0],
            residual_lose=residuals[1],
        )
        for name, values in metrics.items():
            sums.add(name, values)
        sums.add("margin_size", metrics["margin"].abs())
        return loss * batch.weights_B.to(place)

    def _draw(self, key: str, number: int, shape: Sequence[int], tokens: int) -> tuple[str, Tensor, Tensor]:
        """(name, noise [C, H, W], sigma [1]) of one turn of a pair: new every time, or one of the pair's fixed few."""
        recipe, bank = self.recipe, self.recipe.reference_bank
        if not bank:
            return "", draw_noise(shape, seed=recipe.seed, number=number), _sigma(recipe, number, tokens)
        # A turn's number is free of the step, so that the same pair meets the same draws in every epoch.
        turn = int(torch.randint(bank, (), generator=make_generator("turn", recipe.seed, number)))
        seed = int(torch.randint(1 << 62, (), generator=make_generator(key, recipe.seed)))
        sampling = replace(recipe.sigmas, strata=bank)
        sigma = draw_sigmas(sampling, seed=seed, first=turn, count=1, tokens=tokens)
        return f"{key}/{turn}", draw_noise(shape, seed=seed, number=turn), sigma

    def _recall(self, names: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """Reference errors [2 P], winners first."""
        if not self.recipe.reference_bank:
            return compute()
        if not all(name in self.known for name in names):
            found = compute().double().cpu().chunk(2)
            lines = []
            for name, win, lose in zip(names, *(part.tolist() for part in found), strict=True):
                if name not in self.known:
                    self.known[name] = (win, lose)
                    lines.append(json.dumps([name, win, lose]) + "\n")
            with self.errors_path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        errors = torch.tensor([self.known[name] for name in names], dtype=torch.float64)
        return errors.t().flatten().float()

    def after_step(self, metrics: Mapping[str, float]) -> str | None:
        if self.auto_beta is not None:
            self.auto_beta.update(metrics["margin_size"])
        self.win_excess = 0.95 * self.win_excess + 0.05 * metrics["win_excess"]
        self.steps_above = self.steps_above + 1 if self.win_excess > 0 else 0
        if self.steps_above != ALARM_STEPS:
            return None
        return (
            f"the winner's error has been above the reference's for {ALARM_STEPS} steps: the preferred pictures get "
            "worse too. Stop here, or raise the anchor on the winner, lower beta or the learning rate, or set sdpo_mu."
        )

    def state(self) -> dict[str, Any]:
        beta = None if self.auto_beta is None else asdict(self.auto_beta)
        return {"auto_beta": beta, "win_excess": self.win_excess, "steps_above": self.steps_above}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.win_excess, self.steps_above = state["win_excess"], state["steps_above"]
        if self.auto_beta is not None:
            self.auto_beta = AutoBeta(**state["auto_beta"])


def _sigma(recipe: Recipe, number: int, tokens: int) -> Tensor:
    return draw_sigmas(recipe.sigmas, seed=recipe.seed, first=number, count=1, tokens=tokens)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _bin_name(index: int) -> str:
    return f"loss_sigma_{index / _SIGMA_BINS:g}_{(index + 1) / _SIGMA_BINS:g}"


def _read_errors(path: Path) -> dict[str, tuple[float, float]]:
    """Reference errors by name; a line that a kill cut off is left out."""
    known: dict[str, tuple[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            name, win, lose = json.loads(line)
        except ValueError:
            continue
        known[name] = (win, lose)
    return known
