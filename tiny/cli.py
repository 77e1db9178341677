"""Command line of the tiny model.

Cost of `train` on two x86 cores without matrix units: see tiny/README.md. On a GPU minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..ernie_core.model.text_encoder import Tokenizer
from ..ernie_core.model.vae import VAE
from ..ernie_core.pipeline import Pipeline
from . import dit, enhancer, package, scenes, vae
from . import tokenizer as tiny_tokenizer
from .evaluate import evaluate

STAGES = ("vae", "dit", "refine", "enhancer", "package")


def train(args: argparse.Namespace) -> None:
    """Run the wanted stages in order; each one starts from the files of the stages before it."""
    torch.set_flush_denormal(True)  # Adam's squares of vanishing gradients otherwise slow a CPU down tenfold
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(tiny_tokenizer.build_tokenizer(prepend_bos=False))
    text_config = dit.language_config(
        model_type="mistral", vocab_size=len(tokenizer), hidden_size=dit.TEXT_DIM, heads=3, layers=3
    )
    enhancer_config = dit.language_config(
        model_type="ministral3", vocab_size=len(tokenizer), hidden_size=128, heads=4, layers=3
    )
    stages = STAGES if args.stage == "all" else (args.stage,)
    if "vae" in stages:
        vae.train_vae(seed=args.seed, device=device, checkpoint=work / "vae.safetensors")
    if "dit" in stages or "refine" in stages:
        encoder = VAE(vae.CONFIG)
        encoder.load_state_dict(load_file(work / "vae.safetensors"))
        encoder = encoder.to(device, memory_format=torch.channels_last).eval()
        for stage, steps, lr, seed in (("dit", 2600, 4e-3, args.seed), ("refine", 750, 2e-3, args.seed + 1)):
            if stage in stages:
                latents, shown = dit.encode_pictures(encoder, 8000, seed)
                dit.train_dit(
                    latents,
                    shown,
                    tokenizer,
                    text_config,
                    steps=steps,
                    lr=lr,
                    seed=seed,
                    device=device,
                    checkpoint=work / f"{stage}.safetensors",
                    initial=load_file(work / "dit.safetensors") if stage == "refine" else None,
                )
    if "enhancer" in stages:
        enhancer.train_enhancer(
            tokenizer,
            enhancer_config,
            steps=1000,
            seed=args.seed,
            device=device,
            checkpoint=work / "enhancer.safetensors",
        )
    if "package" in stages:
        both = load_file(work / "refine.safetensors")
        package.write_folder(
            args.out,
            transformer=_part(both, "transformer."),
            transformer_config=dit.CONFIG,
            text_encoder=_part(both, "text_encoder."),
            text_config=text_config,
            enhancer=load_file(work / "enhancer.safetensors"),
            enhancer_config=enhancer_config,
            vae=load_file(work / "vae.safetensors"),
            vae_config=vae.CONFIG,
        )


def _part(state_dict: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)}


def run_evaluation(args: argparse.Namespace) -> None:
    """Print the shares of prompts followed and of facts kept, as JSON."""
    start = time.monotonic()
    pipeline = Pipeline.from_folder(args.folder, dtype=torch.float32)
    result: dict[str, object] = {"steps": args.steps, "cfg": args.cfg}
    result["pictures"] = evaluate(
        pipeline, scenes.heldout_prompts(args.count), steps=args.steps, cfg=args.cfg, sheet=args.sheet
    )
    assert pipeline.enhancer is not None
    result["enhancer"] = enhancer.evaluate_enhancer(pipeline.enhancer, count=args.count)
    result["seconds"] = round(time.monotonic() - start)
    print(json.dumps(result, indent=2))


def export(args: argparse.Namespace) -> None:
    for path in package.export_single_files(args.models, folder=args.folder):
        print(path, np.format_float_positional(path.stat().st_size / 1e6, precision=1), "MB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tiny", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="draw the data and train everything from scratch")
    command.add_argument("--stage", choices=("all", *STAGES), default="all")
    command.add_argument("--work", type=Path, default=Path("out/tiny"), help="folder for checkpoints between stages")
    command.add_argument("--out", type=Path, default=package.FOLDER, help="folder of the finished model")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    command.set_defaults(run=train)
    command = commands.add_parser("evaluate", help="measure prompt following on held-out prompts")
    command.add_argument("--folder", type=Path, default=package.FOLDER)
    command.add_argument("--count", type=int, default=200)
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--cfg", type=float, default=4.0)
    command.add_argument("--sheet", type=Path, help="PNG of the first 40 pictures")
    command.set_defaults(run=run_evaluation)
    command = commands.add_parser("export", help="write it as ComfyUI's single files, under the released names")
    command.add_argument("models", type=Path, help="a ComfyUI models folder")
    command.add_argument("--folder", type=Path, default=package.FOLDER)
    command.set_defaults(run=export)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.run(args)
    return 0
