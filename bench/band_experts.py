"""Two LoRA experts for two bands of noise against one LoRA of the same total rank: the lesson of `lora_learns` again.

Same 20 hearts, same pictures of the base beside them, same recipe but for rank, steps and the noise levels that are
trained. Each expert is trained on its band only and merged into its own copy of the transformer; the sampler asks one
of the two per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

from torch import Tensor, nn

from ..ernie_core.pipeline import Pipeline
from ..ernie_core.training.previews import picture_grid
from ..tiny.evaluate import evaluate, paint
from ..tiny.novel import SHAPES_AND_NOVEL
from ..tiny.scenes import heldout_prompts
from .compare import Row
from .lora_learns import RECIPE, asked, make_data
from .tiny_runs import SAMPLING_STEPS, load_tiny, percent, remember, run_job, save_picture, with_lora

EDGE = 0.7
"""Half of what the recipe's density draws lies above it."""
RANK, STEPS = 16, 1200
SEEDS = (0,)
OWN_PROMPTS = 100
BANDS = (("high", EDGE, 1.0), ("low", 0.0, EDGE))

# label -> (rank, steps) of each adapter, and whether there is one per band
ARMS = {
    f"one LoRA of rank {RANK}, {STEPS} steps": (RANK, STEPS, False),
    f"two experts of rank {RANK // 2}, {STEPS // 2} steps each": (RANK // 2, STEPS // 2, True),
}


class Banded(nn.Module):
    """A transformer above `EDGE` and another below, with the calling convention of one."""

    def __init__(self, high: nn.Module, low: nn.Module):
        super().__init__()
        self.high, self.low = high, low

    def __getattr__(self, name: str):
        if name in ("config", "rope", "text_proj", "final_linear"):
            return getattr(self.high, name)
        return super().__getattr__(name)

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor, *args, **kwargs) -> Tensor:
        chosen = self.high if float(timesteps_B[0]) > 1000 * EDGE else self.low
        return chosen(x_BCHW, timesteps_B, *args, **kwargs)


def make_model(base: Pipeline, data, rank: int, steps: int, seed: int, *, banded: bool) -> Pipeline:
    """The base with what was trained for `rank`, `steps` and `seed`."""
    found = []
    for name, low, high in BANDS if banded else (("all", 0.0, 1.0),):
        recipe = replace(
            RECIPE,
            name=f"experts-{name}-r{rank}-{steps}-s{seed}",
            seed=seed,
            steps=steps,
            adapter=replace(RECIPE.adapter, rank=rank),
            sigmas=replace(RECIPE.sigmas, low=low, high=high),
        )
        path, _ = run_job(recipe, data)
        found.append(with_lora(base, path))
    if not banded:
        return found[0]
    high, low = (model.transformer for model in found)
    return replace(base, transformer=Banded(high, low))


def judge(model: Pipeline) -> dict[str, float]:
    """Shares right in colour, shape and place, of the hearts and of the base's own prompts."""
    new = evaluate(model, asked(), steps=SAMPLING_STEPS, shapes=SHAPES_AND_NOVEL)
    own = evaluate(model, heldout_prompts(200)[:OWN_PROMPTS], steps=SAMPLING_STEPS, shapes=SHAPES_AND_NOVEL)
    return {"hearts": new["all"], "own": own["all"]}


def measure() -> Iterator[Row]:
    """A row per arm and question: mean over the seeds, and each of them."""
    base = load_tiny()
    data = make_data(base, preserve=True)
    results: dict[str, list[dict[str, float]]] = {label: [] for label in ARMS}
    grid = {}
    prompts = [text for _, text in [*asked()[:6], *heldout_prompts(200)[:4]]]
    for seed in SEEDS:
        for label, (rank, steps, banded) in ARMS.items():
            model = make_model(base, data, rank, steps, seed, banded=banded)
            results[label].append(judge(model))
            remember("band_experts", results)
            if seed == SEEDS[0]:
                grid[label] = paint(model, prompts, seeds=range(len(prompts)), steps=SAMPLING_STEPS)
    save_picture("band_experts", picture_grid(grid))
    plain, *others = ARMS
    for question, what in (
        ("hearts", "hearts right, 50 held-out prompts"),
        ("own", f"{OWN_PROMPTS} own prompts right"),
    ):
        for label in others:
            ours, peer = ([r[question] for r in results[name]] for name in (label, plain))
            yield Row(
                name=f"{label}: {what}",
                ours=f"{percent(mean(ours))} ({', '.join(map(percent, ours))})",
                peer_name=plain,
                peer=f"{percent(mean(peer))} ({', '.join(map(percent, peer))})",
                target="above the one LoRA" if question == "hearts" else "",
                met=mean(ours) > mean(peer) if question == "hearts" else None,
                untold="shown beside it",
            )
