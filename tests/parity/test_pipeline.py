"""Whole pictures against diffusers' ErnieImagePipeline; fp32, random weights, unequal prompts in one batch."""

import pytest
import torch
from ernie_pack.bench.pairs import make_dit_pair, make_vae_pair
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig
from ernie_pack.ernie_core.model.text_encoder import TextEncoder, Tokenizer
from ernie_pack.ernie_core.pipeline import Pipeline
from ernie_pack.ernie_core.sampling.latents import latent_size, make_noise
from tiny_text import randomise, tekken_bytes, text_config

pytestmark = pytest.mark.parity

PROMPTS = ["the red apple on a wooden table", "\U0001f427", ""]
NEGATIVES = ["", "the blurred", ""]
SEEDS = [1, 2, 3]
WIDTH, HEIGHT = 96, 64


@pytest.fixture(scope="module")
def pair():
    """(Pipeline, ErnieImagePipeline) on shared weights; the tokenizer knows bytes, "the" and " the"."""
    import transformers
    from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer as RustTokenizer

    config = text_config()
    dit = DiTConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_layers=3,
        ffn_hidden_size=96,
        text_in_dim=config["hidden_size"],
        in_channels=16,
        out_channels=16,
        rope_axes_dim=(4, 6, 6),
    )
    vae = VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    our_dit, their_dit = make_dit_pair(dit, dtype=torch.float32)
    our_vae, their_vae = make_vae_pair(vae, dtype=torch.float32)
    their_text = randomise(transformers.MistralModel(transformers.MistralConfig(**config)), seed=0)
    our_text = TextEncoder(config).eval()
    last = f"layers.{config['num_hidden_layers'] - 1}."
    kept = {k: v for k, v in their_text.state_dict().items() if not k.startswith((last, "norm."))}
    our_text.load_state_dict(kept)
    tokenizer = Tokenizer.from_tekken(tekken_bytes())
    theirs = ErnieImagePipeline(
        transformer=their_dit,
        vae=their_vae,
        text_encoder=their_text,
        tokenizer=PrefixBos(RustTokenizer.from_str(tokenizer.to_json()), transformers),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=4.0),
    )
    theirs.set_progress_bar_config(disable=True)
    return Pipeline(transformer=our_dit, text_encoder=our_text, tokenizer=tokenizer, vae=our_vae), theirs


class PrefixBos:
    """A transformers tokenizer that puts <s> first, as the released one does."""

    def __init__(self, tokenizer, transformers):
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=2048
        )

    def __call__(self, text, **options):
        return {"input_ids": [1, *self.tokenizer(text, **options | {"add_special_tokens": False})["input_ids"]]}


def official(theirs, *, steps, cfg):
    noise = make_noise(SEEDS, 16, *latent_size(WIDTH, HEIGHT))
    images = theirs(
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=steps,
        guidance_scale=cfg,
        latents=noise,
        output_type="pt",
        use_pe=False,
    ).images
    return images.permute(0, 2, 3, 1)


@pytest.mark.parametrize(("steps", "cfg"), [(8, 4.0), (50, 4.0), (8, 1.0)])
def test_pictures_are_diffusers(steps, cfg, pair):
    ours, theirs = pair
    assert len({len(ours.tokenizer.encode(p)) for p in (*PROMPTS, *NEGATIVES)}) > 3
    expected = official(theirs, steps=steps, cfg=cfg)
    found = ours.generate(PROMPTS, negatives=NEGATIVES, seeds=SEEDS, width=WIDTH, height=HEIGHT, steps=steps, cfg=cfg)
    assert found.shape == expected.shape == (3, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.05, "the pictures must show something"
    assert 0 < expected.quantile(0.25) < expected.quantile(0.75) < 1, "and not be clamped flat"
    assert float((found - expected).abs().max()) <= 2e-3


def test_another_shift_would_be_noticed(pair):
    ours, theirs = pair
    expected = official(theirs, steps=8, cfg=4.0)
    arguments = {"negatives": NEGATIVES, "seeds": SEEDS, "width": WIDTH, "height": HEIGHT, "steps": 8, "cfg": 4.0}
    assert float((ours.generate(PROMPTS, shift=3.0, **arguments) - expected).abs().max()) > 1e-2
