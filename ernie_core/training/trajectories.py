"""The teacher's way from noise to picture, told on the student's grid: the first stage of a distillation.

Between two sigmas of the student's grid the teacher takes several fine Euler steps. Its mean velocity over them,
(x_i - x_{i+1}) / (sigma_i - sigma_{i+1}), is what the student should answer at (x_i, sigma_i) to arrive where the
teacher arrives, in one step and without guidance: plain regression, no critic. A student that answers it exactly paints
the teacher's picture bit for bit, because the teacher's states are made of those very steps.

What a teacher says does not depend on the student, so trajectories are kept on disk and serve every run.

Shape letters: N steps of the grid; B batch; C latent channels; H, W latent grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ErnieError
from ..sampling.guidance import Denoise
from ..weights.checkpoint import write_safetensors
from .caching import entry_name, is_whole_entry, read_entry
from .objectives import make_generator

VERSION = 1
"""Of the entries' content; raise it when the code computes something else from the same key."""


def fine_sigmas(sigmas: Tensor, substeps: int) -> Tensor:
    """`sigmas` [N + 1] with every step cut into `substeps` of equal width; the grid's own values stay to the bit.

    Raises:
        ErnieError: `substeps` below 1.
    """
    if substeps < 1:
        raise ErnieError(f"substeps must be at least 1, got {substeps}.")
    levels = []
    for high, low in pairwise(sigmas.tolist()):
        levels += [high + (low - high) * i / substeps for i in range(substeps)]
    return torch.tensor([*levels, float(sigmas[-1])], dtype=torch.float64).to(sigmas.dtype)


@torch.no_grad()
def teacher_velocities(teach: Denoise, noise_BCHW: Tensor, sigmas: Tensor, *, substeps: int) -> Tensor:
    """The teacher's mean velocity [N, B, C, H, W] (fp32) over each step of the grid, from `noise_BCHW` at sigmas[0].

    Args:
        teach: guided and, with several teachers, routed velocity; called `substeps` times per step.
        sigmas: the student's grid [N + 1], falling. With one substep the result is the teacher's own velocity.

    Raises:
        ErnieError: `substeps` below 1, or a velocity that is not finite.
    """
    fine = fine_sigmas(sigmas, substeps).tolist()
    x, found = noise_BCHW.float(), []
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        inner, mean = x, torch.zeros_like(x)
        for high, low in pairwise(fine[i * substeps : (i + 1) * substeps + 1]):
            velocity = teach(inner, high).float()
            inner = inner + (low - high) * velocity
            # One substep has the weight 1 exactly.
            mean = mean + (high - low) / (sigma - following) * velocity
        found.append(mean)
        # Not `inner`: the next step starts where the student's own would, so that rounding cannot part them.
        x = x + (following - sigma) * mean
    velocities = torch.stack(found)
    if not velocities.isfinite().all():
        raise ErnieError("the teacher's velocity is not finite; look for a broken LoRA, or use precision bf16 or fp32.")
    return velocities


def state_at(noise: Tensor, velocities: Tensor, sigmas: Tensor, step: int) -> Tensor:
    """Where the teacher stands before step `step` of the grid (N: its picture), from its noise and velocities [N, ...].

    The arithmetic is `sample_euler`'s, bit for bit.
    """
    x = noise.float()
    for velocity, (sigma, following) in zip(velocities[:step], pairwise(sigmas.tolist()), strict=False):
        x = x + (following - sigma) * velocity
    return x


def trajectory_noise(shape_CHW: Sequence[int], *, key: str, turn: int) -> Tensor:
    """Noise [C, H, W] (fp32, CPU) that trajectory `turn` of the prompt `key` starts from, in every run."""
    return torch.randn(*shape_CHW, generator=make_generator("trajectory", key, turn))


class TrajectoryCache:
    """Teachers' velocities on disk, one file per prompt and noise; runs with the same teachers and grid share them."""

    def __init__(self, folder: Path | str, *, teachers: str, sigmas: Tensor, substeps: int):
        """Open `folder`; nothing is read or written yet.

        Args:
            folder: made when the first entry is written.
            teachers: everything that decides what they say: table, guidance, hashes of base and LoRAs, text encoder.
            sigmas, substeps: as for `teacher_velocities`.
        """
        self.folder = Path(folder)
        self.teachers, self.sigmas, self.substeps = teachers, sigmas, substeps

    def key(self, prompt: str, turn: int, tag: str = "") -> str:
        """Everything that decides an entry, as JSON; `prompt` is what names it in `trajectory_noise`."""
        values = {
            "version": VERSION,
            "teachers": hashlib.sha256(self.teachers.encode()).hexdigest(),
            "sigmas": [float(sigma) for sigma in self.sigmas],
            "substeps": self.substeps,
            "prompt": prompt,
            "turn": turn,
            "tag": tag,
        }
        return json.dumps(values, sort_keys=True)

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole."""
        return is_whole_entry(self._path(key), key)

    def velocities(self, key: str) -> Tensor:
        """The teacher's velocities [N, C, H, W] (fp32). ErnieError: missing or damaged."""
        found = read_entry(self._path(key), key, "velocities", "a teacher's trajectory")
        assert found is not None
        return found

    def keep(self, key: str, velocities: Tensor) -> None:
        """Write an entry whole or not at all. ErnieError: the disk is full."""
        write_safetensors({"velocities": velocities.float().cpu()}, self._path(key), metadata={"key": key})

    def _path(self, key: str) -> Path:
        name = entry_name(key)
        return self.folder / "trajectories" / name[:2] / f"{name}.safetensors"
