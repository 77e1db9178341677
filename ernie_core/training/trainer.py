"""The training loop: one frozen base, one trainable adapter, any number of processes.

Everything random is a function of the seed and a sample's running number, so a resumed run needs nothing but the
adapter, the optimiser's state and the step, and is bit-equal to one that never stopped (on the CPU; CUDA's backward
kernels do not promise it). With several processes (`accelerate launch`, `torchrun`) each takes its share of every
step's samples and the gradients are summed; the result is that of one process with the whole batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ErnieError, Interrupted
from ..model.attention import AttentionFunction
from ..model.dit import DiT
from ..sampling.schedule import NUM_TRAIN_TIMESTEPS, make_sigmas
from ..weights.checkpoint import build_vae, read_component
from ..weights.lora import module_shapes, read_lora
from .adapters import Adapter, Views
from .base import load_base
from .blocks import BlockStream, OnBlock, run_blocks, skip_list, watched
from .caching import component_hash
from .distil import make_distil
from .export import lora_metadata, write_trained
from .feed import Batch, Feed, model_hashes_path
from .learner import Learner, part_of
from .losses import Dpo, Objective, Sft, Turn, View
from .objectives import is_drawn, make_generator
from .previews import picture_grid, sample_pictures
from .recipe import Recipe
from .state import Job
from .world import Sums, World, join_world

OnEvent = Callable[[Mapping[str, Any]], None]

MAX_BAD_STEPS = 10
"""Steps in a row with NaN before the run gives up."""


def train(job: Job, *, until: int | None = None, device: str | None = None, on_event: OnEvent | None = None) -> Path:
    """Train `job` from where it stands to the end, or to step `until`; returns the LoRA file.

    Args:
        until: stop there, saved; None = the recipe's steps.
        device: None = CUDA where there is one.
        on_event: sees every line of progress.jsonl as it is written; where it raises `Interrupted` the run saves and
            stops, as it does for the stop file, SIGINT and SIGTERM.

    Raises:
        Interrupted: it was asked to stop; the state is saved.
        ErnieError: data, recipe or models cannot be used; NaN in too many steps in a row; out of memory twice.
    """
    world = join_world(device)
    log = _Log(job, world, on_event)
    # A host may call us in inference mode, whose tensors can never be trained.
    with torch.inference_mode(False), torch.enable_grad(), job.lock() if world.leads else contextlib.nullcontext():
        try:
            with _stop_on_signals(job):
                return Trainer(job, world, log).run(until)
        except Interrupted as e:
            log({"event": "stopped", "message": str(e)})
            raise
        except Exception as e:
            log({"event": "failed", "message": str(e) or type(e).__name__})
            raise


class _Log:
    """Writes events in the leading process; silent in the others."""

    def __init__(self, job: Job, world: World, on_event: OnEvent | None):
        self.job, self.world, self.on_event = job, world, on_event

    def __call__(self, event: Mapping[str, Any]) -> None:
        if not self.world.leads:
            return
        self.job.append(event)
        if self.on_event is not None:
            try:
                self.on_event(event)
            except Interrupted:
                self.job.request_stop()


@contextlib.contextmanager
def _stop_on_signals(job: Job) -> Iterator[None]:
    """SIGINT and SIGTERM become a request to stop, where signals can be caught: in a process's main thread."""
    names = (signal.SIGINT, signal.SIGTERM)
    try:
        old = [signal.signal(name, lambda *_: job.request_stop()) for name in names]
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for name, handler in zip(names, old, strict=True):
            signal.signal(name, handler)


class Trainer:
    """One run in this process: the models, what is trained, and the counters that are saved with it."""

    def __init__(self, job: Job, world: World, log: OnEvent, *, make_feed: Callable[[DiT], Any] | None = None):
        """Load everything and put the newest checkpoint back; `make_feed` replaces the job's own data (see probe)."""
        self.job, self.world, self.log = job, world, log
        self.recipe = recipe = job.recipe()
        if make_feed is None:
            self.feed = Feed(job, recipe, world, log)  # before the base: its networks have gone when that comes
        log({"event": "message", "message": f"loading the base in {recipe.precision}"})
        self.model, self.stream = load_model(recipe, world.device)
        if make_feed is not None:
            self.feed = make_feed(self.model)
        self.views = Views(self.model)
        self.policy = Learner(make_adapter(recipe, self.model, world.device), recipe.optimiser, steps=recipe.steps)
        self.views.add("policy", self.policy.adapter)
        if self.policy.average is not None:
            self.views.add("average", self.policy.average)
        self.objective = self._make_objective()
        self.learners = {"policy": self.policy, **self.objective.learners}
        self.counts = {"bad_steps": 0, "out_of_memory": 0}
        self.step = self._restore()

    def _make_objective(self) -> Objective:
        recipe = self.recipe
        if recipe.objective == "sft":
            return Sft(recipe)
        if recipe.objective == "distil":
            return make_distil(self.job, recipe, self.views, self.feed.text(""), self.world.device)
        reference: tuple[str, ...] = ()
        if recipe.reference_lora:
            lora = read_lora(Path(recipe.reference_lora), module_shapes(self.model))
            self.views.add("reference", Adapter.from_lora(self.model, lora, trainable=False, device=self.world.device))
            reference = ("reference",)
        # A file per process: two would write into each other's lines.
        name = f"reference-{recipe.hash()}-{self.feed.hash}-{self.world.rank}.jsonl"
        return Dpo(recipe, reference=reference, errors_path=self.job.cache_folder / name)

    # --- the loop ---

    def run(self, until: int | None = None) -> Path:
        """Steps up to `until`, checkpoints and samples on the way; the LoRA file."""
        recipe = self.recipe
        last = recipe.steps if until is None else min(until, recipe.steps)
        bad_in_a_row = 0
        if self.step == 0:
            self._sample()
        with self._tensorboard() as board:
            while self.step < last and not self._is_done():
                started = time.perf_counter()
                metrics, good = self.train_step(self.step)
                self.step += 1
                bad_in_a_row = 0 if good else bad_in_a_row + 1
                if good:
                    self.log({"event": "step", "step": self.step, **metrics, "seconds": time.perf_counter() - started})
                    board(metrics, self.step)
                    self._alarm(self.objective.after_step(metrics))
                else:
                    self._count_bad_step(metrics, bad_in_a_row)
                stop, done = self._should_stop(), self._is_done()
                if stop or done or self.step == last or self.step % recipe.save_every == 0:
                    self._save()
                if stop and not done:
                    raise Interrupted(f"stopped at step {self.step} of {recipe.steps}; saved, resume any time.")
                every = recipe.samples.every
                if done or (every and self.step % every == 0):
                    self._sample()
        return self._finish() if self._is_done() else self.job.checkpoint_path(self.step) / "lora.safetensors"

    def _is_done(self) -> bool:
        """Whether the last step is behind us, or the objective has seen enough."""
        return self.step >= self.recipe.steps or self.objective.done

    def train_step(self, step: int) -> tuple[dict[str, float], bool]:
        """(means over the step's samples, whether every update was applied): one that is NaN ends the step."""
        sums, rates, good = Sums(), {}, True
        for turn in self.objective.turns(step):
            learner = self.learners[turn.learner]
            found = self._gradients(turn, learner)
            learner.sum_gradients(self.world)
            norm = learner.clip()
            sums.take(found)
            rates |= {f"lr{turn.suffix}": learner.rate_at(step), f"grad_norm{turn.suffix}": norm}
            good = math.isfinite(norm) and math.isfinite(found.means(self.world, [turn.loss])[turn.loss])
            if good:
                learner.update(step)
            for other in self.learners.values():  # an adversary's loss reaches more than one
                other.clear()
            if not good:
                break
        metrics = sums.means(self.world, ("loss", *self.objective.metric_names))
        return metrics | rates | {"samples": self.feed.samples_in(step)}, good

    def _gradients(self, turn: Turn, learner: Learner) -> Sums:
        """Add this process's share of the gradient; where memory runs out, once more sample by sample."""
        batches = self.feed.micro_batches(turn.step)
        try:
            return self._backward(turn, learner, batches, checkpoint=self.recipe.checkpointing)
        except torch.OutOfMemoryError:
            # Outside of this block: the exception holds the activations.
            self.counts["out_of_memory"] += 1
        learner.clear()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        message = f"step {turn.step + 1} ran out of memory and is repeated sample by sample, with checkpointing."
        self.log({"event": "out_of_memory", "step": turn.step + 1, "message": message})
        try:
            return self._backward(turn, learner, [one for b in batches for one in b.split()], checkpoint=True)
        except torch.OutOfMemoryError as e:
            raise ErnieError(
                f"step {turn.step + 1} does not fit into memory, not even one sample at a time with checkpointing. Use "
                "precision int8 or fp8, stream the blocks, lower the resolution, or close what else uses the GPU. "
                f"The last checkpoint is of step {self.job.newest_step() or 0}."
            ) from e

    def _backward(self, turn: Turn, learner: Learner, batches: Sequence[Batch], *, checkpoint: bool) -> Sums:
        sums, total = Sums(), self.feed.samples_in(turn.step)
        blocks = run_blocks(checkpoint=checkpoint, skip=self._skipped(turn.step), stream=self.stream)
        dtype, device = self.model.x_embedder.proj.weight.dtype, self.world.device

        def velocity(
            x: Tensor,
            sigmas: Tensor,
            texts: Sequence[Tensor],
            view: View,
            attend: AttentionFunction,
            *,
            on_block: OnBlock | None = None,
        ) -> Tensor:
            text = nn.utils.rnn.pad_sequence([t.to(device, dtype) for t in texts], batch_first=True)
            with self.views.active(*view):
                return self.model(
                    x.to(device, dtype),
                    NUM_TRAIN_TIMESTEPS * sigmas.to(device),
                    text,
                    text_lengths=[len(t) for t in texts],
                    attend=attend,
                    run_block=blocks if on_block is None else watched(blocks, on_block),
                )

        learner.adapter.train()
        for batch in batches:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                generator = make_generator("dropout", self.recipe.seed, batch.numbers[0])
                torch.manual_seed(generator.initial_seed())
                losses = self.objective.losses(batch, velocity, sums, turn)
                sums.add(turn.loss, losses)
                (losses.sum() / total).backward()
        learner.adapter.eval()
        return sums

    def _skipped(self, step: int) -> tuple[int, ...]:
        """Blocks left out in this step (elastic depth)."""
        depth = self.recipe.depth
        reduced = depth.skip and is_drawn(depth.share, "depth", seed=self.recipe.seed, number=step)
        return skip_list(len(self.model.layers), depth.skip) if reduced else ()

    # --- what can go wrong ---

    def _count_bad_step(self, metrics: Mapping[str, float], in_a_row: int) -> None:
        self.counts["bad_steps"] += 1
        terms = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        message = f"step {self.step}: {terms} not finite; that update and what followed in the step were left out."
        self.log({"event": "bad_step", "step": self.step, "message": message})
        if in_a_row >= MAX_BAD_STEPS:
            self._save()
            raise ErnieError(
                f"{terms} was not finite in {in_a_row} steps in a row. The weights are those of step "
                f"{self.step - in_a_row}, saved. Lower the learning rate, look for a broken picture or LoRA, or use "
                "precision bf16 or fp32."
            )

    def _alarm(self, message: str | None) -> None:
        if message is not None:
            self.log({"event": "alarm", "step": self.step, "message": f"step {self.step}: {message}"})

    def _should_stop(self) -> bool:
        """The same answer in every process."""
        asked = torch.tensor([float(self.world.leads and self.job.stop_requested())], device=self.world.device)
        return bool(self.world.sum(asked) > 0)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Callable[[Mapping[str, float], int], None]]:
        """A function that logs a step's metrics; does nothing unless the recipe asks for it."""
        if not (self.recipe.tensorboard and self.world.leads):
            yield lambda *_: None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ErnieError("the recipe asks for TensorBoard logs: install the package tensorboard.") from e
        with SummaryWriter(str(self.job.folder / "tensorboard"), purge_step=self.step + 1) as writer:

            def log(metrics: Mapping[str, float], step: int) -> None:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step)

            yield log

    # --- checkpoints ---

    def _save(self) -> None:
        if self.world.leads:
            tensors, values = self.policy.pack()
            others = {}
            for name, learner in self.objective.learners.items():
                more, others[name] = learner.pack()
                tensors |= {f"{name}.{key}": w for key, w in more.items()}
            state = {
                "optimiser": values,
                "learners": others,
                "objective": self.objective.state(),
                "counts": self.counts,
                "recipe": self.recipe.hash(),
                "data": self.feed.hash,
            }
            path = self.job.save(self.step, tensors, state, self._write_lora, keep=self.recipe.keep)
            self.log({"event": "saved", "step": self.step, "message": f"saved {path.name}"})
        self.world.barrier()

    def _write_lora(self, path: Path) -> None:
        base = self.recipe.models.path("transformer")
        metadata = lora_metadata(
            self.recipe,
            step=self.step,
            averaged=self.policy.average is not None,
            base_hash=component_hash(base, "transformer", memo=model_hashes_path(self.job)),
            data_hash=self.feed.hash,
            trigger=self.feed.trigger,
            items=self.feed.items,
        )
        shapes = module_shapes(self.model)
        write_trained(self.policy.result.to_lora(), path, shapes, dtype=self.recipe.save_dtype, metadata=metadata)

    def _restore(self) -> int:
        """Put the newest whole checkpoint back; its step, or 0 when there is none."""
        found = self.job.load()
        if found is None:
            if self.world.leads:
                self.job.rewind_events(-1)
            return 0
        for what, now in (("recipe", self.recipe.hash()), ("data", self.feed.hash)):
            if found.values[what] != now:
                raise ErnieError(
                    f"the checkpoint of step {found.step} was trained with another {what}. Give the job a new name, "
                    "or start it over."
                )

        self.policy.unpack(found.tensors, found.values["optimiser"])
        for name, learner in self.objective.learners.items():
            learner.unpack(part_of(found.tensors, name), found.values["learners"][name])
        self.objective.restore(found.values["objective"])
        self.counts.update(found.values["counts"])
        if self.world.leads:
            self.job.rewind_events(found.step)
        self.log({"event": "resumed", "step": found.step, "message": f"going on from step {found.step}"})
        return found.step

    # --- pictures and the end ---

    def _sample(self) -> None:
        """Write samples/step-N.png, one row per setting; the leading process draws, the others wait."""
        s, models = self.recipe.samples, self.recipe.models
        if s.prompts and self.world.leads:
            from PIL import Image

            started = time.perf_counter()
            vae = build_vae(read_component(models.path("vae"), "vae"), dtype=torch.float32, device=self.world.device)
            vae.eval().requires_grad_(False)
            texts, empty = [self.feed.text(prompt) for prompt in s.prompts], self.feed.text("")
            common = {"seed": s.seed, "width": s.width, "height": s.height}

            def row(name: str, model: DiT, views: Views, sigmas: Tensor, cfg: float) -> dict[str, list]:
                with views.active(view):
                    painted = sample_pictures(model, vae, texts, empty, sigmas=sigmas, cfg=cfg, **common)
                return {f"step {self.step}: {name}, {len(sigmas) - 1} steps, cfg {cfg:g}": painted}

            view = "policy" if self.policy.average is None else "average"
            rows = row("Base", self.model, self.views, *self.recipe.sampled_on())
            if models.turbo:
                turbo = load_base(models.turbo, precision=self.recipe.precision, device=self.world.device)
                turbo_views = Views(turbo)
                turbo_views.add(view, self.policy.result)
                rows |= row("Turbo", turbo, turbo_views, make_sigmas(s.turbo_steps), s.turbo_cfg)
            self.job.samples_folder.mkdir(exist_ok=True)
            path = self.job.samples_folder / f"step-{self.step:06d}.png"
            Image.fromarray(picture_grid(rows, s.prompts)).save(path)
            message = f"samples in {time.perf_counter() - started:.0f} s"
            self.log({"event": "sampled", "step": self.step, "path": str(path), "message": message})
        self.world.barrier()

    def _finish(self) -> Path:
        """Copy the last LoRA to the job folder under the recipe's name."""
        final = self.job.lora_path
        if self.world.leads:
            part = final.with_suffix(".part")
            shutil.copyfile(self.job.checkpoint_path(self.step) / "lora.safetensors", part)
            os.replace(part, final)
            self.log({"event": "finished", "step": self.step, "path": str(final), "message": f"finished: {final.name}"})
        self.world.barrier()
        return final


def load_model(recipe: Recipe, device: torch.device) -> tuple[DiT, BlockStream | None]:
    """The frozen base on `device`, or in RAM with its blocks streamed to it."""
    base = load_base(
        recipe.models.path("transformer"), precision=recipe.precision, device="cpu" if recipe.stream else device
    )
    return base, BlockStream(base, device) if recipe.stream else None


def make_adapter(recipe: Recipe, model: DiT, device: torch.device) -> Adapter:
    """What is trained: a new adapter, or the LoRA that the recipe starts from."""
    if not recipe.initial_lora:
        return Adapter(model, recipe.adapter, seed=recipe.seed, device=device)
    lora = read_lora(Path(recipe.initial_lora), module_shapes(model))
    return Adapter.from_lora(model, lora, trainable=True, device=device)
