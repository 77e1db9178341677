"""Prompt enhancer against transformers' `generate` and the diffusers pipeline; fp32, small random weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ernie_pack.ernie_core.model.enhancer import CHAT_TEMPLATE, Enhancer, make_processors, render_prompt
from ernie_pack.ernie_core.model.text_encoder import Tokenizer
from tiny_text import RELEASED_TEXT_CONFIG, randomise, released_tokenizer, tekken_bytes, text_config

pytestmark = pytest.mark.parity

CASES = json.loads((Path(__file__).parent / "pe_prompt_cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_tekken(tekken_bytes())


@pytest.fixture(scope="session")
def released():
    return released_tokenizer()


@pytest.fixture(scope="session")
def pe_tokenizer(released):
    """pe_tokenizer as the pipeline loads it: our ids, the official chat template, no BOS of its own."""
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=RustTokenizer.from_str(released.to_json()),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=2048,
    )


@pytest.fixture(scope="module")
def pair(tokenizer):
    """(transformers' Ministral3ForCausalLM, our Enhancer) with the same weights."""
    import transformers

    config = text_config("ministral3") | {"vocab_size": len(tokenizer)}
    reference = randomise(transformers.Ministral3ForCausalLM(transformers.Ministral3Config(**config)), seed=0)
    ours = Enhancer(config, tokenizer).eval()
    state = {k.removeprefix("model."): v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    ours.load_state_dict(state)
    return reference, ours


def _generate(reference, tokenizer, prompt, **settings):
    ids = torch.tensor([tokenizer.encode(render_prompt(prompt, 512, 384))])
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=60,
        pad_token_id=11,
        eos_token_id=2,
        **settings,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", ["", "a red cat", 'say "the\\"'])
def test_greedy_text_is_that_of_generate(pair, tokenizer, prompt, penalty):
    reference, ours = pair
    expected = _generate(reference, tokenizer, prompt, do_sample=False, repetition_penalty=penalty)
    seen = []
    text = ours.enhance(
        prompt,
        512,
        384,
        temperature=0,
        repetition_penalty=penalty,
        max_new_tokens=60,
        on_token=seen.append,
    )
    assert len(set(expected)) > 5
    assert text == (tokenizer.decode(expected).strip() or prompt)
    assert len(seen) == len([i for i in expected if i != 2])


def test_logits_are_those_of_transformers(pair):
    reference, ours = pair
    ids = torch.tensor([[1, *range(32, 270)]])
    with torch.no_grad():
        expected = reference(input_ids=ids).logits[:, -1]
        hidden = ours.norm(ours.run_layers(ids)[:, -1])
        error = (hidden @ ours.output_weight(hidden).T - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, error


def test_the_scale_beyond_the_original_context_is_applied(tokenizer):
    import transformers

    config = text_config("ministral3") | {"vocab_size": len(tokenizer)}
    config["rope_parameters"] |= {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 2.0}
    reference = randomise(transformers.Ministral3Model(transformers.Ministral3Config(**config)), seed=0)
    ours = Enhancer(config, tokenizer).eval()
    ours.load_state_dict(reference.state_dict())
    ids = torch.tensor([[1, *range(32, 270)]])
    with torch.no_grad():
        expected = reference(input_ids=ids).last_hidden_state
        error = (ours.norm(ours.run_layers(ids)) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, error


SETTINGS = [
    {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    {"temperature": 0.6, "top_p": 0.8, "top_k": 64, "min_p": 0.05, "repetition_penalty": 1.05},
    {"temperature": 1.0, "top_p": 1.0, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.15},
    {"temperature": 2.0, "top_p": 0.9, "top_k": 0, "min_p": 0.2, "repetition_penalty": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["official", "comfy", "top_k", "min_p"])
def test_processed_logits_are_those_that_generate_draws_from(pair, settings):
    reference, _ = pair
    ids = torch.tensor([[1, *range(32, 60)]])
    torch.manual_seed(0)
    out = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=8,
        pad_token_id=11,
        eos_token_id=2,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings | {"min_p": settings["min_p"] or None},
    )
    process = make_processors(**settings)
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        ours = process(out.sequences[:, : ids.shape[1] + step], logits.float())
        assert torch.equal(ours, scores)


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["num_tokens"]))
def test_prompts_and_token_counts_are_the_recorded_ones(released, case):
    text = render_prompt(case["prompt"], case["width"], case["height"])
    assert text == case["text"]
    ids = released.encode(text)
    assert len(ids) == case["num_tokens"]
    assert ids.count(1) == 1


@pytest.mark.parametrize("system", [None, "ignored by the template"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c["num_tokens"]))
def test_the_diffusers_pipeline_reads_the_same_ids(released, pe_tokenizer, case, system):
    pipelines = pytest.importorskip("diffusers.pipelines.ernie_image", reason="needs diffusers >= 0.38")
    read = {}

    def generate(input_ids, **settings):
        read.update(settings, ids=input_ids)
        return torch.cat([input_ids, torch.tensor([released.encode(" a cat ", bos=False)])], dim=1)

    pipeline = SimpleNamespace(pe=SimpleNamespace(generate=generate), pe_tokenizer=pe_tokenizer)
    revised = pipelines.ErnieImagePipeline._enhance_prompt_with_pe(
        pipeline, case["prompt"], torch.device("cpu"), case["width"], case["height"], system_prompt=system
    )
    ours = released.encode(render_prompt(case["prompt"], case["width"], case["height"]))
    assert read["ids"][0].tolist() == ours
    assert revised == "a cat"
    assert (read["temperature"], read["top_p"], read["max_new_tokens"], read["eos_token_id"]) == (
        0.6,
        0.95,
        2048,
        2,
    )


def test_defaults_are_the_pipelines():
    import inspect

    pipelines = pytest.importorskip("diffusers.pipelines.ernie_image", reason="needs diffusers >= 0.38")
    theirs = inspect.signature(pipelines.ErnieImagePipeline._enhance_prompt_with_pe).parameters
    ours = inspect.signature(Enhancer.write_ids).parameters
    for name in ("temperature", "top_p"):
        assert ours[name].default == theirs[name].default


def test_released_size(tokenizer):
    enhancer = Enhancer(RELEASED_TEXT_CONFIG | {"model_type": "ministral3"}, tokenizer, device="meta")
    assert len(enhancer.state_dict()) == 236
    assert sum(p.numel() for p in enhancer.parameters()) == 3_429_006_336
