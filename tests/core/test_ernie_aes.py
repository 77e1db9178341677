"""ERNIE-Image-Aes: prompt, score tokens, key map, configurations; the numbers are in tests/parity."""

import hashlib
import json

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
from ernie_pack.ernie_core.errors import CheckpointError, ErnieError
from ernie_pack.ernie_core.scoring.ernie_aes import (
    SCORE_TOKENS,
    build_network,
    expected_score,
    load_ernie_aes,
    prepare,
    question,
    render,
    to_transformers,
    transformers_names,
)
from ernie_pack.ernie_core.scoring.network import LowBitLinear, check_shapes, read_weights
from ernie_pack.ernie_core.weights.four_bit import quantise_nf4

# config.json of InternVL3-8B: InternViT-300M and Qwen2.5-7B, as ERNIE-Image-Aes and ArtiMuse have them (7.94B)
RELEASED = {
    "model_type": "internvl_chat",
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151674,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "aes"
    tiny.write_internvl(path)
    return path


def pictures(count=4):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) for i in range(count)]


def test_the_question_is_artimuse_s_to_the_byte():
    """The digest is of the string in ArtiMuse's score() at 750d980."""
    asked = question("artimuse")
    digest = "44add3d4d8e19034638648cf932161dde5dbc191851afac8e6d019cef7d5d6ad"
    assert hashlib.sha256(asked.encode()).hexdigest() == digest
    plain = question("plain")
    assert [line.strip() for line in asked.strip().splitlines()] == plain.splitlines()
    assert plain.splitlines()[0] == "Rate the aesthetics score of the image in 0-100."
    with pytest.raises(ErnieError, match="artimuse, plain"):
        question("loud")


def test_the_conversation_is_internvl_2_5_s():
    text = render(3, system="S")
    assert text.startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 3 + "</img>\n"
    )
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    digest = hashlib.sha256(render(1).split("system\n")[1].split("<|im_end|>")[0].encode()).hexdigest()
    assert digest == SYSTEM_DIGEST


SYSTEM_DIGEST = "bdb4d179c4c458dd9bd365588d3fd15aba0f2b755b4b192383416f610ad3396e"


def test_101_tokens_stand_for_0_to_100():
    assert len(set(SCORE_TOKENS)) == 101
    for number, token in {0: "aa", 25: "az", 26: "ca", 50: "cy", 51: "da", 75: "dy", 76: "ea", 100: "ey"}.items():
        assert SCORE_TOKENS[number] == token


def test_the_expected_value_of_the_score_tokens_only():
    ids = torch.arange(101) * 2 + 5
    logits = torch.full((3, 300), 50.0)  # other tokens are likelier, and do not count
    logits[:, ids] = -40.0
    logits[0, ids[73]] = 0.0
    logits[1, ids[[20, 40]]] = 0.0
    logits[2, ids] = 7.0
    assert expected_score(logits, ids).tolist() == pytest.approx([73, 30, 50], abs=1e-3)


def test_pictures_are_squashed_not_cropped():
    """White left half, black right half: still so after a 2 : 1 picture became a square."""
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, :30] = 255
    made = prepare(picture)
    assert (made.shape, made.dtype) == ((3, 448, 448), torch.float32)
    white = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    black = [-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert made[:, 200, 10].tolist() == pytest.approx(white, abs=1e-5)
    assert made[:, 200, -10].tolist() == pytest.approx(black, abs=1e-5)


def test_every_published_key_has_one_place_and_every_place_a_key():
    """The names of InternVL3-8B's model.safetensors.index.json against the network that transformers builds.

    24 vision layers of 14 tensors, 28 language layers of 12, 4 + 6 + 3 outside: 685, 7.94 billion numbers.
    """
    import transformers
    from ernie_pack.ernie_core.scoring.ernie_aes import make_config

    shapes = tiny.internvl_shapes(RELEASED)
    assert len(shapes) == 24 * 14 + 28 * 12 + 13 == 685
    assert sum(torch.Size(s).numel() for s in shapes.values()) == pytest.approx(7.94e9, rel=1e-3)
    with torch.device("meta"):
        network = transformers.InternVLForConditionalGeneration(make_config(RELEASED, "here"))
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
    mapped = to_transformers(published, "here")
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    check_shapes(expected, {name: tuple(t.shape) for name, t in mapped.items()}, "here")
    assert len(mapped) == 685 + 2 * 24 * 2  # a fused qkv becomes three


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vision_model.encoder.layers.3.ls1", ("model.vision_tower.encoder.layer.3.lambda_1",)),
        ("language_model.model.layers.0.mlp.up_proj.weight", ("model.language_model.layers.0.mlp.up_proj.weight",)),
        ("vision_tower.encoder.layer.0.lambda_2", ("model.vision_tower.encoder.layer.0.lambda_2",)),
        ("model.multi_modal_projector.linear_1.bias", ("model.multi_modal_projector.linear_1.bias",)),
        ("vision_model.encoder.layers.0.attn.wqkv.weight", ()),
        ("score_head.weight", ()),
    ],
)
def test_names(name, expected):
    assert transformers_names(name) == expected


def test_the_layout_that_transformers_saves_gives_the_same_score(folder, tmp_path):
    from safetensors.torch import save_file

    weights = read_weights(folder)
    scorer = load_ernie_aes(weights, precision="fp32")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    scorer.network.config.save_pretrained(str(tmp_path))
    save_file(
        {k: v.contiguous() for k, v in to_transformers(weights.tensors, folder).items()}, tmp_path / "model.safetensors"
    )
    again = load_ernie_aes(read_weights(tmp_path), precision="fp32")
    assert again.score(pictures()) == pytest.approx(scorer.score(pictures()), abs=1e-4)


@pytest.mark.parametrize(("precision", "near"), [("bf16", 1.0), ("int8", 1.0), ("fp8", 2.0), ("nf4", 12.0)])
def test_fewer_bits_give_nearly_the_same_score(folder, precision, near):
    exact = load_ernie_aes(read_weights(folder), precision="fp32").score(pictures())
    scorer = load_ernie_aes(read_weights(folder), precision=precision)
    assert scorer.score(pictures()) == pytest.approx(exact, abs=near)
    quantised = [m for m in scorer.network.modules() if isinstance(m, LowBitLinear)]
    # 2 vision layers x 6 matrices (q, k, v, projection, fc1, fc2), 2 language layers x 7
    assert len(quantised) == (0 if precision == "bf16" else 26)
    held = {m.weight.numel() / (m.in_features * m.out_features) for m in quantised}
    assert held <= {0.5 if precision == "nf4" else 1.0}
    assert {m.weight.dtype.itemsize for m in quantised} <= {1}


def write_bitsandbytes(folder, target):
    """The folder as bitsandbytes leaves it: the layers' matrices and the projector's in 4 bits, the rest in bf16."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in read_weights(folder).tensors.items():
        if tensor.ndim != 2 or not name.endswith("weight") or "lm_head" in name or "embed" in name:
            tensors[name] = tensor.bfloat16()
            continue
        made = quantise_nf4(tensor)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(tensor.shape)}
        tensors |= {
            name: made.codes[:, None],
            f"{name}.absmax": made.absmax,
            f"{name}.quant_map": made.table,
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "config.json"):
        (target / name).write_bytes((folder / name).read_bytes())


def test_a_file_in_4_bits_keeps_them_and_scores_as_the_same_bits_made_here(folder, tmp_path):
    """Fused qkv and all. The projector, in 4 bits too there, is multiplied out."""
    write_bitsandbytes(folder, tmp_path)
    scorer = load_ernie_aes(read_weights(tmp_path))
    assert sum(isinstance(m, LowBitLinear) for m in scorer.network.modules()) == 26
    made = load_ernie_aes(read_weights(folder), precision="nf4")
    projector = made.network.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.copy_(quantise_nf4(linear.weight.float()).dequantised(torch.bfloat16))
    assert scorer.score(pictures()) == pytest.approx(made.score(pictures()), abs=0.5)
    in_bf16 = load_ernie_aes(read_weights(tmp_path), precision="bf16")
    assert not any(isinstance(m, LowBitLinear) for m in in_bf16.network.modules())
    assert in_bf16.score(pictures()) == pytest.approx(scorer.score(pictures()), abs=1e-6)


def test_only_the_tokens_in_use_are_kept(folder):
    scorer = load_ernie_aes(read_weights(folder), precision="fp32")
    assert scorer.network.lm_head.weight.shape == (101, 32)
    assert len(scorer.network.get_input_embeddings().weight) == len(scorer.prompt_ids.unique()) == 134  # of 366


def test_batches_and_order_change_nothing(folder):
    scorer = load_ernie_aes(read_weights(folder), precision="fp32")
    images = pictures(5)
    alone = [scorer.score([image])[0] for image in images]
    assert scorer.score(images[::-1], batch_size=3) == pytest.approx(alone[::-1], abs=1e-4)
    assert len({round(s, 3) for s in alone}) > 1


def test_the_way_of_asking_matters(folder):
    weights = read_weights(folder)
    one, other = (load_ernie_aes(weights, precision="fp32", style=s).score(pictures(1)) for s in ("artimuse", "plain"))
    assert one != other


# --- bad input -------------------------------------------------------------------------------------------------------


def broken(tmp_path, **changes):
    tiny.write_internvl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[part] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "internvl_chat"),
        ({"ps_version": "v1"}, "ps_version"),
        ({"select_layer": -4}, "select_layer"),
        ({"llm_config__architectures": ["InternLM2ForCausalLM"]}, "InternLM2ForCausalLM"),
        ({"llm_config__rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"llm_config__num_hidden_layers": 3}, "missing"),
        ({"vision_config__num_hidden_layers": 1}, "extra"),
        ({"llm_config__intermediate_size": 20}, "another shape"),
    ],
)
def test_another_model_s_config(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        build_network(read_weights(broken(tmp_path, **changes)), precision="fp32")


def test_a_tokenizer_without_the_score_tokens(tmp_path):
    tiny.write_internvl(tmp_path, leave_out=("cq", "ey"))
    with pytest.raises(CheckpointError, match=r"no cq, ey \(2 of 104"):
        load_ernie_aes(read_weights(tmp_path), precision="fp32")


def test_a_folder_without_a_tokenizer(tmp_path):
    tiny.write_internvl(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_ernie_aes(read_weights(tmp_path), precision="fp32")


def test_one_shard_of_the_folder_means_the_folder(folder):
    weights = read_weights(folder / "model-00001-of-00002.safetensors")
    assert weights.folder == folder
    assert "mlp1.0.weight" in weights.tensors
    assert load_ernie_aes(weights, precision="fp32").name == "aes"


def test_a_missing_shard(tmp_path):
    tiny.write_internvl(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        read_weights(tmp_path)
