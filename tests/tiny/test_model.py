"""The shipped ernie-image-tiny: its layout, its equality with the reference implementation, and what it can do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from ernie_pack.ernie_core.pipeline import Pipeline
from ernie_pack.ernie_core.sampling.latents import make_noise
from ernie_pack.ernie_core.weights.checkpoint import read_component
from ernie_pack.tiny import scenes
from ernie_pack.tiny.enhancer import evaluate_enhancer
from ernie_pack.tiny.evaluate import evaluate
from ernie_pack.tiny.package import FOLDER, export_single_files


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_folder(FOLDER, dtype=torch.float32)


def test_whole_model_is_at_most_12_mb():
    total = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    assert total <= 12_000_000, total


def test_folder_has_every_part_of_the_official_layout():
    parts = {"pe", "pe_tokenizer", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert parts == {name for name in index if not name.startswith("_")}
    assert parts == {f.name for f in FOLDER.iterdir() if f.is_dir()}
    assert json.loads((FOLDER / "scheduler/scheduler_config.json").read_text())["shift"] == 4.0


def test_single_files_hold_the_same_weights(tmp_path):
    export_single_files(tmp_path)
    for kind, name in (
        ("transformer", "diffusion_models/ernie-image.safetensors"),
        ("text_encoder", "text_encoders/ministral-3-3b.safetensors"),
        ("enhancer", "text_encoders/ernie-image-prompt-enhancer.safetensors"),
        ("vae", "vae/flux2-vae.safetensors"),
    ):
        folder, single = read_component(FOLDER, kind), read_component(tmp_path / name, kind)
        assert folder.state_dict.keys() == single.state_dict.keys()
        assert all(torch.equal(single.state_dict[k], w) for k, w in folder.state_dict.items())


@pytest.mark.parity
def test_pictures_equal_those_of_diffusers(pipeline):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the reference implementation, is not installed")
    reference = diffusers.ErnieImagePipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    prompts = ["a large red star in the center on a sky background", "small blue ring, top left"]
    theirs = reference(
        prompt=prompts,
        latents=make_noise([1, 2], 128, 8, 8),
        height=128,
        width=128,
        num_inference_steps=20,
        guidance_scale=4.0,
        use_pe=False,
        output_type="np",
    ).images
    ours = pipeline.generate(prompts, seeds=[1, 2], width=128, height=128, steps=20).numpy()
    assert np.abs(ours - theirs).max() <= 2e-3


@pytest.mark.slow
def test_paints_what_held_out_prompts_say(pipeline):
    # The first 60 of the 200 that `python -m tiny evaluate` measures: a minute instead of four.
    result = evaluate(pipeline, scenes.heldout_prompts(200)[:60], steps=50, cfg=4.0)
    assert result["all"] >= 0.9, result


@pytest.mark.slow
def test_enhancer_makes_prompts_longer_and_keeps_every_fact(pipeline):
    result = evaluate_enhancer(pipeline.enhancer, count=50)
    assert result["kept_every_fact"] >= 0.95, result


def test_tiny_readme_states_the_measured_share():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    share = re.search(r"colour, shape and place right: \*\*(\d+(?:\.\d+)?) %\*\*", text)
    assert share, "tiny/README.md must state the measured share"
    assert float(share[1]) >= 90
