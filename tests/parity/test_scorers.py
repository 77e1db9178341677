"""Scorers against their formulas written out in plain torch, on small random models under the published names."""

import math

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
import torch.nn.functional as F
from ernie_pack.ernie_core.scoring.ernie_aes import load_ernie_aes, render
from ernie_pack.ernie_core.scoring.loading import load_scorer
from ernie_pack.ernie_core.scoring.network import read_weights
from PIL import Image

pytestmark = pytest.mark.parity


def pictures(count, *, seed=0):
    """Of different sizes, colours and textures."""
    rng = np.random.default_rng(seed)
    made = []
    for h, w in rng.integers(40, 90, (count, 2)):
        ramp = np.linspace(0, 1, h)[:, None, None] * rng.integers(-200, 200, 3)
        made.append((rng.integers(0, 256, 3) + ramp + rng.normal(0, 40, (h, w, 3))).clip(0, 255).astype(np.uint8))
    return made


# --- ERNIE-Image-Aes -------------------------------------------------------------------------------------------------


def reference_vit(t, config, pixels_BCHW):
    """InternViT of modeling_intern_vit.py: fused qkv, layer scale, no final norm."""
    vision = config["vision_config"]
    heads, eps = vision["num_attention_heads"], vision["layer_norm_eps"]
    e = "vision_model.embeddings"
    patches = F.conv2d(
        pixels_BCHW, t[f"{e}.patch_embedding.weight"], t[f"{e}.patch_embedding.bias"], stride=vision["patch_size"]
    )
    x = torch.cat([t[f"{e}.class_embedding"].expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + t[f"{e}.position_embedding"]
    for i in range(vision["num_hidden_layers"]):
        w = {k.removeprefix(f"vision_model.encoder.layers.{i}."): v for k, v in t.items()}
        b, n, c = x.shape
        y = F.layer_norm(x, (c,), w["norm1.weight"], w["norm1.bias"], eps)
        q, k, v = (
            F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        )
        y = ((q * (c // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).reshape(b, n, c), w["attn.proj.weight"], w["attn.proj.bias"])
        x = x + y * w["ls1"]
        y = F.layer_norm(x, (c,), w["norm2.weight"], w["norm2.bias"], eps)
        y = F.linear(
            F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"]
        )
        x = x + y * w["ls2"]
    return x[:, 1:]


def reference_projector(t, features_BLC):
    """pixel_shuffle of ps_version v2 and mlp1: a 2 x 2 square of patches becomes one token."""
    b, n, c = features_BLC.shape
    side = math.isqrt(n)
    grid = features_BLC.reshape(b, side // 2, 2, side // 2, 2, c)  # row, row in square, column, column in square
    x = grid.permute(0, 1, 3, 2, 4, 5).reshape(b, n // 4, 4 * c)
    x = F.layer_norm(x, (4 * c,), t["mlp1.0.weight"], t["mlp1.0.bias"], 1e-5)
    return F.linear(F.gelu(F.linear(x, t["mlp1.1.weight"], t["mlp1.1.bias"])), t["mlp1.3.weight"], t["mlp1.3.bias"])


def reference_qwen2(t, config, x):
    text = config["llm_config"]
    heads, kv_heads, eps = text["num_attention_heads"], text["num_key_value_heads"], text["rms_norm_eps"]

    def norm(x, gain):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain

    b, s, d = x.shape
    k_dim = d // heads
    angles = torch.arange(s)[:, None] * text["rope_theta"] ** (-torch.arange(0, k_dim, 2) / k_dim)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    later = torch.full((s, s), -math.inf).triu(1)
    for i in range(text["num_hidden_layers"]):
        w = {k.removeprefix(f"language_model.model.layers.{i}."): v for k, v in t.items()}
        y = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            F.linear(y, w[f"self_attn.{p}_proj.weight"], w[f"self_attn.{p}_proj.bias"])
            .reshape(b, s, -1, k_dim)
            .transpose(1, 2)
            for p in "qkv"
        )
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
        attention = (rotate(q) @ rotate(k).transpose(-2, -1) / k_dim**0.5 + later).softmax(-1)
        x = x + F.linear((attention @ v).transpose(1, 2).reshape(b, s, d), w["self_attn.o_proj.weight"])
        y = norm(x, w["post_attention_layernorm.weight"])
        y = F.silu(F.linear(y, w["mlp.gate_proj.weight"])) * F.linear(y, w["mlp.up_proj.weight"])
        x = x + F.linear(y, w["mlp.down_proj.weight"])
    return norm(x, t["language_model.model.norm.weight"])


def reference_aes(t, config, tokenizer, picture):
    """One picture, one number: ArtiMuse's score()."""
    square = Image.fromarray(picture).resize((56, 56), Image.BICUBIC)
    pixels = torch.tensor(np.asarray(square)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    features = reference_projector(t, reference_vit(t, config, ((pixels - mean) / std)[None]))
    ids = tokenizer(render(features.shape[1]), add_special_tokens=False)["input_ids"]
    x = t["language_model.model.embed_tokens.weight"][ids]
    x[torch.tensor(ids) == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")] = features[0]
    logits = t["language_model.lm_head.weight"] @ reference_qwen2(t, config, x[None])[0, -1]
    letters = {"a": (0, 26), "c": (26, 25), "d": (51, 25), "e": (76, 25)}
    number = {f + chr(97 + i): low + i for f, (low, n) in letters.items() for i in range(n)}
    assert sorted(number.values()) == list(range(101))
    chosen = logits[[tokenizer.convert_tokens_to_ids(token) for token in number]]
    return float((chosen.softmax(0) * torch.tensor([float(n) for n in number.values()])).sum())


@pytest.fixture(scope="module")
def aes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "ERNIE-Image-Aes"
    return folder, tiny.write_internvl(folder)


def test_ernie_image_aes_against_its_formulas(aes_folder):
    import transformers

    folder, tensors = aes_folder
    config = tiny.internvl_config(tensors["language_model.lm_head.weight"].shape[0])
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(str(folder))
    scorer = load_ernie_aes(read_weights(folder), precision="fp32")
    images = pictures(5)
    ours = scorer.score(iter(images), batch_size=2)
    reference = [reference_aes(tensors, config, tokenizer, image) for image in images]
    assert ours == pytest.approx(reference, abs=1e-3)
    assert max(reference) - min(reference) > 0.3, "the pictures must not all score alike"


# --- CLIP ------------------------------------------------------------------------------------------------------------

PROMPTS = ["a red fox in snow", "two blue boats", "a red fox in snow", "the word HELLO on a wall", "rain"]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def reference_crop(picture, side=28):
    """torchvision's Resize(side, BICUBIC) and CenterCrop(side) on a PIL image."""
    image = Image.fromarray(picture)
    w, h = image.size
    image = image.resize((side, int(side * h / w)) if w <= h else (int(side * w / h), side), Image.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def reference_pad(picture, side=28):
    """ResizeMaxSize(side, fill=0) of HPS v2's transform.py."""
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    out = np.zeros((side, side, 3), dtype=np.uint8)
    top, left = (side - image.height) // 2, (side - image.width) // 2
    out[top : top + image.height, left : left + image.width] = np.asarray(image)
    return Image.fromarray(out)


def clip_pixels(image):
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def reference_blocks(t, prefix, x, heads, activation, mask=None):
    """open_clip's residual attention blocks."""
    i = 0
    while f"{prefix}.{i}.ln_1.weight" in t:
        w = {k.removeprefix(f"{prefix}.{i}."): v for k, v in t.items()}
        n, d = x.shape
        y = F.layer_norm(x, (d,), w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = (
            z.reshape(n, heads, -1).transpose(0, 1)
            for z in F.linear(y, w["attn.in_proj_weight"], w["attn.in_proj_bias"]).chunk(3, -1)
        )
        scores = q @ k.transpose(1, 2) / (d // heads) ** 0.5
        y = (scores if mask is None else scores + mask).softmax(-1) @ v
        x = x + F.linear(y.transpose(0, 1).reshape(n, d), w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        y = F.layer_norm(x, (d,), w["ln_2.weight"], w["ln_2.bias"])
        y = activation(F.linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        x = x + F.linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
        i += 1
    return x


def reference_clip_image(t, image, activation):
    patches = F.conv2d(clip_pixels(image)[None], t["visual.conv1.weight"], stride=14)[0].flatten(1).T
    x = torch.cat([t["visual.class_embedding"][None], patches]) + t["visual.positional_embedding"]
    d = x.shape[-1]
    x = F.layer_norm(x, (d,), t["visual.ln_pre.weight"], t["visual.ln_pre.bias"])
    x = reference_blocks(t, "visual.transformer.resblocks", x, 12, activation)[0]
    x = F.layer_norm(x, (d,), t["visual.ln_post.weight"], t["visual.ln_post.bias"]) @ t["visual.proj"]
    return x / x.norm()


def reference_clip_text(t, text, activation):
    """One token per byte, </w> on the last of each word."""
    words = text.lower().split()
    ids = [tiny.CLIP_VOCABULARY - 2]
    for word in words:
        alphabet = tiny.byte_alphabet()
        ids += [alphabet.index(c) for c in word[:-1]] + [256 + alphabet.index(word[-1])]
    ids.append(tiny.CLIP_VOCABULARY - 1)
    x = t["token_embedding.weight"][ids] + t["positional_embedding"][: len(ids)]
    mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    x = reference_blocks(t, "transformer.resblocks", x, 2, activation, mask)
    x = F.layer_norm(x, x.shape[-1:], t["ln_final.weight"], t["ln_final.bias"])[-1] @ t["text_projection"]
    return x / x.norm()


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory):
    """As HPS_v2.1_compressed.pt: a pickle with a state dict inside."""
    folder = tmp_path_factory.mktemp("open_clip")
    tensors = tiny.open_clip_tensors()
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}, path)
    tiny.write_clip_tokenizer(folder)
    return path, tensors


@pytest.mark.parametrize(
    ("kind", "fit", "formula"),
    [
        ("auto", reference_pad, lambda cosine: cosine),  # HPS v2, by the file's name
        ("pickscore", reference_crop, lambda cosine: math.exp(2.5) * cosine),
        ("clip", reference_crop, lambda cosine: 100 * max(cosine, 0)),
    ],
)
def test_clip_scores_against_their_formulas(open_clip_file, kind, fit, formula):
    path, tensors = open_clip_file
    scorer = load_scorer(path, kind=kind)
    images = pictures(5)
    ours = scorer.score(iter(images), PROMPTS, batch_size=2)
    reference = [
        formula(float(reference_clip_image(tensors, fit(i), quick_gelu) @ reference_clip_text(tensors, p, quick_gelu)))
        for i, p in zip(images, PROMPTS, strict=True)
    ]
    assert ours == pytest.approx(reference, abs=1e-4)
    assert len({round(r, 3) for r in reference}) >= 2


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_laion_against_its_formula(open_clip_file, tmp_path, head):
    path, tensors = open_clip_file
    weights = tiny.laion_head(head, 24)
    torch.save(weights, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    scorer = load_scorer(tmp_path / "sa_0_4_vit_l_14_linear.pth", backbone=path)
    images = pictures(4)
    reference = []
    for image in images:
        x = reference_clip_image(tensors, reference_crop(image), quick_gelu)
        for name in [n for n in weights if n.endswith("weight")]:
            x = weights[name] @ x + weights[name.replace("weight", "bias")]
        reference.append(float(x))
    assert scorer.score(images, batch_size=3) == pytest.approx(reference, abs=1e-4)


def test_a_transformers_folder_against_transformers_itself(tmp_path):
    """PickScore_v1 is published so: its own processor and model, and the formula of its page."""
    import transformers

    model = tiny.write_clip_folder(tmp_path / "PickScore_v1")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tmp_path / "PickScore_v1"))
    images = pictures(5)
    text = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.stack([clip_pixels(reference_crop(i)) for i in images])
    with torch.no_grad():
        reference = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
    scorer = load_scorer(tmp_path / "PickScore_v1")
    assert scorer.name == "PickScore"
    ours = scorer.score(images, PROMPTS, batch_size=2)
    assert ours == pytest.approx(reference.logits_per_image.diagonal().tolist(), abs=1e-3)


# --- ImageReward -----------------------------------------------------------------------------------------------------


def reference_bert_attention(w, part, x, keys, bias, heads=2):
    def linear(name, z):
        return F.linear(z, w[f"{part}.{name}.weight"], w[f"{part}.{name}.bias"])

    q, k, v = (
        linear(f"self.{n}", z).reshape(len(z), heads, -1).transpose(0, 1)
        for n, z in (("query", x), ("key", keys), ("value", keys))
    )
    y = ((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    gain = w[f"{part}.output.LayerNorm.weight"], w[f"{part}.output.LayerNorm.bias"]
    return F.layer_norm(linear("output.dense", y) + x, x.shape[-1:], *gain, 1e-12)


def reference_image_reward(t, picture, text):
    """ImageReward.py: score()."""
    v = {k.removeprefix("blip.visual_encoder."): z for k, z in t.items()}
    patches = F.conv2d(
        clip_pixels(reference_crop(picture))[None], v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=7
    )
    x = torch.cat([v["cls_token"][0], patches[0].flatten(1).T]) + v["pos_embed"][0]
    d = x.shape[-1]
    for i in range(2):
        w = {k.removeprefix(f"blocks.{i}."): z for k, z in v.items()}
        y = F.layer_norm(x, (d,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, u = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).chunk(3, -1)  # width 64: one head
        y = (q @ k.T / d**0.5).softmax(-1) @ u
        x = x + F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(x, (d,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), w["mlp.fc2.weight"], w["mlp.fc2.bias"]
        )
        x = x + y
    seen = F.layer_norm(x, (d,), v["norm.weight"], v["norm.bias"], 1e-6)

    e = {k.removeprefix("blip.text_encoder.embeddings."): z for k, z in t.items()}
    letters = [c for word in text.lower().split() for c in ((word[0], False), *((c, True) for c in word[1:]))]
    ids = [2, *(5 + "abcdefghijklmnopqrstuvwxyz".index(c) + 26 * inside for c, inside in letters), 3][:35]
    ids[-1] = 3
    rows = [*ids, *[0] * (35 - len(ids))]
    hide = torch.tensor([0.0 if n < len(ids) else -math.inf for n in range(35)])
    x = e["word_embeddings.weight"][rows] + e["position_embeddings.weight"][:35]
    x = F.layer_norm(x, x.shape[-1:], e["LayerNorm.weight"], e["LayerNorm.bias"], 1e-12)
    for i in range(2):
        w = {k.removeprefix(f"blip.text_encoder.encoder.layer.{i}."): z for k, z in t.items()}
        x = reference_bert_attention(w, "attention", x, x, hide)
        x = reference_bert_attention(w, "crossattention", x, seen, 0)
        y = F.gelu(F.linear(x, w["intermediate.dense.weight"], w["intermediate.dense.bias"]))
        y = F.linear(y, w["output.dense.weight"], w["output.dense.bias"])
        x = F.layer_norm(y + x, x.shape[-1:], w["output.LayerNorm.weight"], w["output.LayerNorm.bias"], 1e-12)
    x = x[0]
    for place in (0, 2, 4, 6, 7):
        x = t[f"mlp.layers.{place}.weight"] @ x + t[f"mlp.layers.{place}.bias"]
    return (float(x) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_against_its_formulas(tmp_path):
    tensors = tiny.image_reward_tensors(tiny.write_bert_vocabulary(tmp_path))
    torch.save(tensors, tmp_path / "ImageReward.pt")
    scorer = load_scorer(tmp_path / "ImageReward.pt")
    images = pictures(4)
    texts = ["a red fox", "two blue boats", "rain", "a very long prompt that goes on beyond the limit of tokens"]
    reference = [reference_image_reward(tensors, i, p) for i, p in zip(images, texts, strict=True)]
    assert scorer.score(images, texts, batch_size=3) == pytest.approx(reference, abs=1e-4)
    assert len({round(r, 2) for r in reference}) == 4
