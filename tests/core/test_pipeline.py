"""Prompt to picture on random weights: every picture depends on its own prompt and seed, mistakes are named."""

import pytest
import torch
from ernie_pack.bench.pairs import randomise
from ernie_pack.ernie_core.config import DiTConfig, VAEConfig
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.model.text_encoder import TextEncoder, Tokenizer
from ernie_pack.ernie_core.model.vae import VAE
from ernie_pack.ernie_core.pipeline import Pipeline, make_denoise
from ernie_pack.ernie_core.sampling.latents import make_noise
from ernie_pack.ernie_core.weights.checkpoint import Component, save_folder_component
from tiny_text import randomise as randomise_text
from tiny_text import tekken_bytes, text_config

DIT = DiTConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    ffn_hidden_size=96,
    text_in_dim=text_config()["hidden_size"],
    in_channels=16,
    out_channels=16,
    rope_axes_dim=(4, 6, 6),
)
AUTOENCODER = VAEConfig(latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8)
SMALL = {"width": 48, "height": 32, "steps": 3, "cfg": 3.0}
CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(scope="module")
def pipeline():
    dit, vae = DiT(DIT).eval(), VAE(AUTOENCODER).eval()
    randomise(dit)
    randomise(vae)
    text_encoder = randomise_text(TextEncoder(text_config()), seed=0)
    return Pipeline(
        transformer=dit, text_encoder=text_encoder, tokenizer=Tokenizer.from_tekken(tekken_bytes()), vae=vae
    )


def test_pictures_are_floats_between_0_and_1_on_the_cpu(pipeline):
    out = pipeline.generate(["the cat", "a"], seeds=[1, 2], **SMALL)
    assert out.shape == (2, 32, 48, 3)
    assert out.dtype == torch.float32
    assert 0 <= out.min() < out.max() <= 1


def test_a_batch_is_its_pictures_one_by_one(pipeline):
    prompts, negatives, seeds = ["the cat in the hat", "a", ""], ["", "the worst", "b"], [5, 6, 5]
    batch = pipeline.generate(prompts, negatives=negatives, seeds=seeds, **SMALL)
    for i in range(3):
        alone = pipeline.generate([prompts[i]], negatives=[negatives[i]], seeds=[seeds[i]], **SMALL)
        torch.testing.assert_close(batch[i : i + 1], alone, **CLOSE)


def test_the_same_call_gives_the_same_picture(pipeline):
    arguments = {"prompts": ["the cat"], "seeds": [3], **SMALL}
    assert torch.equal(pipeline.generate(**arguments), pipeline.generate(**arguments))


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["the dog"]},
        {"seeds": [4]},
        {"negatives": ["the cat"]},
        {"steps": 4},
        {"cfg": 5.0},
        {"shift": 3.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_matters(change, pipeline):
    arguments = {"prompts": ["the cat"], "seeds": [3], **SMALL}
    plain = pipeline.generate(**arguments)
    assert not torch.allclose(pipeline.generate(**arguments | change), plain, atol=1e-3)


def test_cfg_1_never_reads_the_negative(pipeline, monkeypatch):
    encoded = []
    encode = Pipeline.encode
    monkeypatch.setattr(
        Pipeline, "encode", lambda self, prompts: encoded.append(list(prompts)) or encode(self, prompts)
    )
    pipeline.generate(["the cat"], seeds=[1], **SMALL | {"cfg": 1.0})
    assert encoded == [["the cat"]]


def test_text_comes_at_its_true_length_with_one_bos(pipeline):
    assert [len(t) for t in pipeline.encode(["", "a", "the cat"])] == [1, 2, 6]


def test_a_denoiser_of_unequal_prompts_is_each_alone(pipeline):
    texts = pipeline.encode(["the cat", "a"])
    x = make_noise([1, 2], 16, 2, 3)
    both = make_denoise(pipeline.transformer, texts, 2, 3)(x, 0.7)
    for i in range(2):
        alone = make_denoise(pipeline.transformer, texts[i : i + 1], 2, 3)(x[i : i + 1], 0.7)
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=1e-5)


def test_less_denoise_stays_closer_to_the_picture(pipeline):
    image = pipeline.generate(["the cat"], seeds=[1], **SMALL)
    with torch.no_grad():
        back = pipeline.vae.decode(pipeline.vae.encode(image.permute(0, 3, 1, 2) * 2 - 1))
    kept = (back / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    distances = []
    for denoise in (0.0, 0.05, 0.3, 0.9):
        out = pipeline.generate(["a"], seeds=[2], image_BHWC=image, denoise=denoise, **SMALL)
        distances.append(float((out - kept).abs().mean()))
    assert distances[0] < 1e-6
    assert distances == sorted(distances)
    assert distances[1] > 1e-3


def test_on_step_counts_and_may_stop(pipeline):
    seen = []
    pipeline.generate(["a"], seeds=[1], on_step=lambda i, n, x, x0: seen.append((i, n, x0.shape)), **SMALL)
    assert seen == [(i, 3, (1, 16, 2, 3)) for i in range(3)]

    def stop(step, steps, x, x0):
        raise Interrupted

    with pytest.raises(Interrupted):
        pipeline.generate(["a"], seeds=[1], on_step=stop, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 50}, r"width must be a multiple of 16, got 50; use 48 or 64"),
        ({"seeds": [1]}, "as many as pictures, got 2, 1 and 2"),
        ({"negatives": [""]}, "as many as pictures, got 2, 2 and 1"),
        ({"denoise": 0.5}, "denoise 0.5 needs a picture to start from"),
        ({"image_BHWC": torch.zeros(2, 16, 48, 3), "denoise": 0.5}, "image_BHWC must be 48 x 32, got 48 x 16"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"shift": 0.0}, "shift must be above 0"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_mistakes_are_named_before_any_work(arguments, message, pipeline, monkeypatch):
    monkeypatch.setattr(DiT, "forward", lambda *a, **k: pytest.fail("the transformer must not run"))
    given = {"prompts": ["a", "b"], "seeds": [1, 2], **SMALL} | arguments
    with pytest.raises(ErnieError, match=message):
        pipeline.generate(**given)


def test_a_folder_gives_the_pipeline_it_was_written_from(pipeline, tmp_path):
    tokenizer = pipeline.tokenizer.to_json()
    parts = {
        "transformer": (DIT.to_dict(), pipeline.transformer.state_dict(), None),
        "vae": (AUTOENCODER.to_dict(), pipeline.vae.state_dict(), None),
        "text_encoder": (text_config(), released_layers(pipeline.text_encoder), tokenizer),
    }
    for kind, (config, state_dict, tokenizer_json) in parts.items():
        component = Component(
            kind=kind, config=config, state_dict=state_dict, tokenizer=tokenizer_json, source=tmp_path
        )
        save_folder_component(component, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    loaded = Pipeline.from_folder(tmp_path, dtype=torch.float32, enhancer=False)
    arguments = {"prompts": ["the cat"], "seeds": [3], **SMALL}
    torch.testing.assert_close(loaded.generate(**arguments), pipeline.generate(**arguments), **CLOSE)


def released_layers(text_encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """The tensors of a file: the layer and the norm that the encoder leaves out are there too."""
    state = dict(text_encoder.state_dict())
    last = text_config()["num_hidden_layers"] - 1
    state |= {
        k.replace("layers.0.", f"layers.{last}."): v.clone() for k, v in state.items() if k.startswith("layers.0.")
    }
    return state | {"norm.weight": torch.ones(text_config()["hidden_size"])}
