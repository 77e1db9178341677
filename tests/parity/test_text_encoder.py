"""Text encoder and tokenizer against transformers and recorded ids; fp32, small random weights."""

import json
from pathlib import Path

import pytest
import torch
from ernie_pack.ernie_core.model.text_encoder import TextEncoder
from tiny_text import RELEASED_TEXT_CONFIG, ROPE, randomise, released_tekken, released_tokenizer, text_config

pytestmark = pytest.mark.parity

LENGTHS = (1, 5, 300)


@pytest.fixture(scope="session")
def tokenizer():
    return released_tokenizer()


def _reference(config, wrapped):
    """A transformers model of `config`: the multimodal wrapper that the release names, or the model alone."""
    import transformers

    if not wrapped:
        name = {"mistral": "Mistral", "ministral3": "Ministral3"}[config["model_type"]]
        model = getattr(transformers, name + "Model")(getattr(transformers, name + "Config")(**config))
        return randomise(model, seed=0)
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Mistral3Config(text_config=config, vision_config=vision)
    return randomise(transformers.Mistral3Model(config), seed=0)


def _language_model_weights(reference):
    """Weights under the bare names, without what the text encoder does not run."""
    state = {k.removeprefix("language_model."): v for k, v in reference.state_dict().items()}
    last = f"layers.{text_config()['num_hidden_layers'] - 1}."
    return {k: v for k, v in state.items() if k.startswith(("embed_tokens.", "layers.")) and not k.startswith(last)}


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
NEAR = ROPE | {
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 1024,
    "factor": 4.0,
    "mscale": 0.7,
}
CASES = {
    "mistral in the wrapper, as released": (text_config(), "yarn", True),
    "mistral alone": (text_config(), "yarn", False),
    "ministral3 in the wrapper": (text_config("ministral3"), "yarn", True),
    "ministral3 alone": (text_config("ministral3"), "yarn", False),
    "yarn with a cosine scale other than 1": (text_config() | {"rope_parameters": NEAR}, "yarn", False),
    "no rope scaling": (text_config() | {"rope_parameters": PLAIN}, "yarn", False),
    "plain rope from the released config": (text_config(), "plain", False),
}


@pytest.mark.parametrize(("config", "rope", "wrapped"), CASES.values(), ids=CASES)
def test_hidden_states_are_the_second_to_last_of_transformers(config, rope, wrapped):
    reference_config = config | {"rope_parameters": dict(PLAIN if rope == "plain" else config["rope_parameters"])}
    reference = _reference(reference_config, wrapped)
    ours = TextEncoder(config, rope=rope)
    ours.load_state_dict(_language_model_weights(reference))
    generator = torch.Generator().manual_seed(1)
    batch = [[1, *torch.randint(32, 320, (n - 1,), generator=generator).tolist()] for n in LENGTHS]
    for ids, hidden in zip(batch, ours.encode_ids(batch), strict=True):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0]
        error = (hidden - expected).abs().max().item()
        assert error <= 1e-5 * expected.abs().max().item(), (
            len(ids),
            error,
        )  # fp32 rounding, padded against single


def test_wrong_rope_would_be_noticed():
    config = text_config()
    yarn, plain = randomise(TextEncoder(config), seed=0), TextEncoder(config, rope="plain")
    plain.load_state_dict(yarn.state_dict())
    (a,), (b,) = (encoder.encode_ids([[1, *range(32, 320)]]) for encoder in (yarn, plain))
    assert (a - b).abs().max() > 1e-2 * a.abs().max()


@pytest.fixture(scope="module")
def released():
    return TextEncoder(RELEASED_TEXT_CONFIG, device="meta", dtype=torch.bfloat16)


def test_released_yarn_frequencies(released):
    base = 1e6 ** (-torch.arange(64, dtype=torch.float64) / 64)
    ramp = ((torch.arange(64, dtype=torch.float64) - 20) / 17).clip(0, 1)
    ratio = released.inverse_frequencies.double() / base
    assert torch.allclose(ratio, 1 - ramp + ramp / 16, rtol=1e-6)
    picked = {20: 1.0, 21: 0.9449, 23: 0.8346, 28: 0.5588, 36: 0.1176, 37: 0.0625, 63: 0.0625}
    assert {i: round(ratio[i].item(), 4) for i in picked} == picked


def test_released_shapes(released):
    shapes = {k: tuple(v.shape) for k, v in released.state_dict().items()}
    assert shapes["embed_tokens.weight"] == (131072, 3072)
    assert shapes["layers.24.self_attn.q_proj.weight"] == (4096, 3072)
    assert shapes["layers.0.self_attn.k_proj.weight"] == shapes["layers.0.self_attn.v_proj.weight"] == (1024, 3072)
    assert shapes["layers.0.self_attn.o_proj.weight"] == (3072, 4096)
    assert shapes["layers.0.mlp.gate_proj.weight"] == shapes["layers.0.mlp.up_proj.weight"] == (9216, 3072)
    assert shapes["layers.0.mlp.down_proj.weight"] == (3072, 9216)
    assert len(shapes) == 1 + 25 * 9
    # 3,429,006,336 in the whole language model, less the 26th layer and the final norm
    assert sum(p.numel() for p in released.parameters()) == 3_429_006_336 - 116_398_080 - 3072


@pytest.mark.parametrize(
    ("text", "count", "start"),
    [
        ("a", 2, [1, 1097]),
        ("", 1, [1]),
        (
            "A stone lighthouse on a rocky shore at dawn, waves breaking below it and a small fishing boat "
            "far out on the water",
            26,
            [1, 1065, 15551, 1295, 118910, 1408, 1261],
        ),
        (
            "A red apple on a wooden table, soft daylight, realistic photo.",
            15,
            [1, 1065, 4804, 46227, 1408, 1261, 32656],
        ),
    ],
    ids=["a", "empty", "lighthouse", "apple"],
)
def test_recorded_ids_of_the_official_tokenizer(tokenizer, text, count, start):
    ids = tokenizer.encode(text)
    assert (len(ids), ids[: len(start)]) == (count, start)
    assert tokenizer.decode(ids) == text


def test_specials_are_the_first_thousand_ids(tokenizer):
    assert len(tokenizer) == 131072
    text = "<unk><s></s>[INST][/INST][IMG]<pad>[SYSTEM_PROMPT][/SYSTEM_PROMPT]<SPECIAL_20><SPECIAL_999>"
    assert tokenizer.encode(text, bos=False) == [0, 1, 2, 3, 4, 10, 11, 17, 18, 20, 999]


def test_ids_are_those_of_mistral_common(tokenizer):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(released_tekken())
    cases = json.loads((Path(__file__).parent / "pe_prompt_cases.json").read_text(encoding="utf-8"))["cases"]
    texts = [case["prompt"] for case in cases] + [
        "Don't  stop\n\n\tNOW, 12345 \U0001f600\U0001f3fd aaaaaaa!!!???\r\n  x"
    ]
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text, bos=True, eos=False)
