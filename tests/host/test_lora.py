"""LoRAs in a running ComfyUI: our loader against core's, on our model and on core's, whole and between noise levels."""

from __future__ import annotations

from pathlib import Path

import core_loaders
import pytest
import torch
from comfyui_server import HostError
from ernie_pack.ernie_core.weights.checkpoint import read_component, save_single_file
from ernie_pack.ernie_core.weights.lora import DIALECTS, parse_lora, weight_shapes, write_lora
from ernie_pack.ernie_core.weights.quantise import LayerQuantisation, quantise_fp8
from ernie_pack.standalone import host as standalone
from ernie_pack.standalone import load_node_classes
from ernie_pack.standalone.graph import Workflow, run_prompt
from host_graph import Graph, difference
from lora_dialects import make_factors, spell

pytestmark = pytest.mark.host

SAME = 1e-3  # fp32; changed weights against changed outputs, summed over the steps
READ_BY_CORE = ("comfyui", "diffusers", "kohya", "onetrainer_comfy", "onetrainer_legacy")
NEUTRAL = {"strength": 1.0, "blocks": "", "start": 1.0, "end": 0.0, "allow_unmatched": False}


@pytest.fixture(scope="module")
def server(has_core_model, start_comfyui):
    """A ComfyUI with nodes that load core's classes, where it has them; hides the server of the other tests."""
    with start_comfyui(*([Path(core_loaders.__file__)] if has_core_model else [])) as server:
        yield server


@pytest.fixture(scope="module")
def component(server):
    return read_component(server.base / "models" / "diffusion_models" / "ernie-image.safetensors", "transformer")


@pytest.fixture(scope="module")
def lora_file(server, component):
    """lora_file(algorithm, dialect, seed) -> name of a file in models/loras that adapts every matrix of the blocks."""
    folder = server.base / "models" / "loras"
    shapes = weight_shapes(component.state_dict)

    def write(algorithm="lora", dialect="comfyui", seed=0):
        name = f"{algorithm} {dialect} {seed}.safetensors".replace(" ", "_")
        if not (folder / name).exists():
            made = {}
            for i, (path, shape) in enumerate(shapes.items()):
                if path.startswith("layers.") and len(shape) == 2:
                    made[path] = make_factors(algorithm, *shape, rank=4, seed=100 * seed + i)
                    if "dora_scale" in made[path]:
                        axis = 1 if made[path]["dora_scale"].shape[0] == shape[0] else 0
                        norms = component.state_dict[f"{path}.weight"].float().norm(dim=axis, keepdim=True)
                        made[path]["dora_scale"] = norms * (1 + 0.05 * (made[path]["dora_scale"] - 1))
                    down = {
                        k: v * 0.2 for k, v in made[path].items() if k in ("lora_B", "lokr_w1", "hada_w1_a", "diff")
                    }
                    made[path] |= down
            lora = parse_lora(spell("musubi", made, alpha=2.0), shapes)
            write_lora(lora, folder / name, dialect=dialect)
        return name

    return write


def load(graph, name, model=None, **changes):
    return graph.add("ErnieLoadLora", model=model or graph.model, lora_name=name, **NEUTRAL | changes)


def load_with_core(graph, name, model=None, strength=1.0):
    return graph.add("LoraLoaderModelOnly", model=model or graph.model, lora_name=name, strength_model=strength)


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "lokr factors", "loha", "diff", "dora columns"])
def test_our_loader_does_to_the_bit_what_cores_does(algorithm, latents, lora_file, new_log):
    graph, name = Graph(), lora_file(algorithm)
    core, ours, plain = latents(
        graph,
        graph.ernie_sampler(model=load_with_core(graph, name, strength=0.8)),
        graph.ernie_sampler(model=load(graph, name, strength=0.8)),
        graph.ernie_sampler(),
    )
    assert "lora key not loaded" not in new_log()
    if algorithm == "dora columns":  # ours is another class with the same law
        assert difference(core, ours) < SAME
    else:
        assert torch.equal(core, ours)
    assert difference(plain, ours) > 20 * SAME


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same_lora(dialect, latents, lora_file, new_log):
    graph = Graph()
    links = [
        graph.ernie_sampler(model=load(graph, lora_file())),
        graph.ernie_sampler(model=load(graph, lora_file("lora", dialect))),
    ]
    if dialect in READ_BY_CORE:
        links.append(graph.ernie_sampler(model=load_with_core(graph, lora_file("lora", dialect))))
    first, *others = latents(graph, *links)
    for other in others:
        assert difference(first, other) < 1e-5  # alpha multiplied in, or kept
    assert "lora key not loaded" not in new_log()


def test_a_dora_has_the_norms_it_was_trained_with(latents, lora_file, server, tmp_path, monkeypatch, record_property):
    """As standalone, whose formula the core tests prove. Core's loader leaves the change out of the norm."""
    graph, name = Graph(), lora_file("dora")
    core, ours, plain = latents(
        graph,
        graph.ernie_sampler(model=load_with_core(graph, name)),
        graph.ernie_sampler(model=load(graph, name)),
        graph.ernie_sampler(),
    )
    here = run_standalone(graph, graph.ernie_sampler(model=load(graph, name)), server, tmp_path, monkeypatch)
    assert difference(here, ours) < SAME
    assert difference(plain, ours) > 20 * SAME
    record_property("core's DoRA differs by", difference(core, ours))


def run_standalone(graph, link, server, tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "session", standalone.Session(models=server.base / "models", output=tmp_path))
    classes = load_node_classes()
    needed: dict = {}

    def gather(number):
        needed[number] = graph.prompt[number]
        for value in graph.prompt[number]["inputs"].values():
            if isinstance(value, list):
                gather(value[0])

    gather(link[0])
    seen = {}
    cls = classes["ErnieSampler"]
    original = standalone.sample

    def sample(*args, **kwargs):
        seen["latent"] = original(*args, **kwargs)
        return seen["latent"]

    monkeypatch.setattr(standalone, "sample", sample)
    decoded = graph.add("VAEDecode", samples=link, vae=graph.vae)
    saved = graph.add("SaveImage", images=decoded, filename_prefix="x")
    for end in (decoded, saved):
        gather(end[0])
    assert cls
    run_prompt(Workflow(prompt=needed, page=None), classes)
    return seen["latent"]["samples"]


def test_a_neutral_lora_changes_no_bit(latents, lora_file):
    graph, name = Graph(), lora_file()
    neutral = [
        load(graph, name, strength=0.0),
        load(graph, name, blocks="all:0"),
        load(graph, name, start=0.5, end=0.5),
        load(graph, name, strength=0.0, start=0.9, end=0.2),
    ]
    plain, *others = latents(graph, graph.ernie_sampler(), *(graph.ernie_sampler(model=m) for m in neutral))
    assert all(torch.equal(plain, other) for other in others)


def test_block_weights_are_strengths_of_their_blocks(latents, lora_file):
    graph, name = Graph(), lora_file()
    half, by_blocks, parts, pieces = latents(
        graph,
        graph.ernie_sampler(model=load(graph, name, strength=0.5)),
        graph.ernie_sampler(model=load(graph, name, blocks="all:0.5")),
        graph.ernie_sampler(model=load(graph, name, blocks="0-2:0.5, 3-6 attention:0")),
        graph.ernie_sampler(
            model=load(
                graph,
                name,
                model=load(graph, name, blocks="all:0, 0-2:0.5"),
                blocks="0-2:0, 3-6 attention:0, other:0",
            )
        ),
    )
    assert torch.equal(half, by_blocks)
    assert torch.equal(parts, pieces)
    assert difference(half, parts) > 10 * SAME


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha", "dora", "dora columns"])
@pytest.mark.parametrize("sampler", ["ernie_sampler", "ksampler"])
def test_a_lora_at_every_noise_level_used_is_the_plain_one(sampler, algorithm, latents, lora_file):
    graph, name = Graph(), lora_file(algorithm)
    sample = getattr(graph, sampler)
    plain, ranged, without = latents(
        graph, sample(model=load(graph, name)), sample(model=load(graph, name, end=0.001)), sample()
    )
    assert difference(plain, ranged) < SAME
    assert difference(plain, without) > 20 * SAME


@pytest.mark.parametrize("sampler", ["ernie_sampler", "ksampler"])
def test_two_ranges_that_meet_are_the_whole(sampler, latents, lora_file):
    graph, name = Graph(), lora_file()
    sample = getattr(graph, sampler)
    first = load(graph, name, end=0.8)
    both = load(graph, name, model=first, start=0.8)
    plain, joined, early, late = latents(
        graph,
        sample(model=load(graph, name)),
        sample(model=both),
        sample(model=first),
        sample(model=load(graph, name, start=0.8)),
    )
    assert difference(plain, joined) < SAME
    assert difference(plain, early) > SAME
    assert difference(plain, late) > SAME
    assert difference(early, late) > SAME


def test_plain_and_ranged_loras_stack_with_core_loras_and_custom_samplers(latents, lora_file):
    graph = Graph()
    names = [lora_file("lora", seed=1), lora_file("dora", seed=2), lora_file("lokr", seed=3)]

    def stacked(end):
        model = load_with_core(graph, names[0], strength=0.5)
        model = load(graph, names[1], model=model, strength=0.7, end=end)
        return load(graph, names[2], model=model, strength=-0.5, end=end)

    sigmas = graph.add("ErnieSigmas", steps=5, shift=4.0, denoise=1.0)
    plain, ranged, other = latents(
        graph,
        graph.ernie_sampler(model=stacked(0.0)),
        graph.ernie_sampler(model=stacked(0.001)),
        graph.custom_sampler(sigmas, model=stacked(0.001)),
    )
    assert difference(plain, ranged) < SAME
    assert difference(ranged, other) < SAME


def test_a_ranged_lora_leaves_the_model_as_it_was(latents, lora_file):
    """The loader's MODEL is cached between the runs, and shared by the clones."""
    first = Graph()
    (before,) = latents(first, first.ernie_sampler())
    graph = Graph()
    ranged, plain = latents(
        graph,
        graph.ernie_sampler(model=load(graph, lora_file("dora"), start=0.9, end=0.3)),
        graph.ernie_sampler(seed=8),
    )
    again = Graph()
    (after,) = latents(again, again.ernie_sampler(denoise=1.0, seed=7))
    assert difference(before, ranged) > SAME
    assert torch.equal(before, after)
    assert not torch.equal(after, plain)


# --- core's model -------------------------------------------------------------------------------------------


@pytest.fixture
def core_model(has_core_model):
    """Add core's MODEL to a graph."""
    if not has_core_model:
        pytest.skip("this ComfyUI has no ERNIE-Image model of its own")
    return lambda graph: graph.add("CoreModel", file="ernie-image.safetensors")


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "loha"])
def test_on_cores_model_our_loader_does_what_cores_does(algorithm, latents, lora_file, core_model):
    graph, name = Graph(), lora_file(algorithm)
    model = core_model(graph)
    core, ours, mixed = latents(
        graph,
        graph.ksampler(model=load_with_core(graph, name, model=model)),
        graph.ksampler(model=load(graph, name, model=model)),
        graph.ksampler(model=graph.add("ModelSamplingSD3", model=load(graph, name), shift=3.0)),
    )
    assert torch.equal(core, ours)
    assert difference(ours, mixed) < SAME


@pytest.mark.parametrize("algorithm", ["lora", "dora", "dora columns"])
def test_on_cores_model_a_range_is_the_plain_one_where_it_covers_all(algorithm, latents, lora_file, core_model):
    graph, name = Graph(), lora_file(algorithm)
    model = core_model(graph)
    plain, ranged, part, none = latents(
        graph,
        graph.ksampler(model=load(graph, name, model=model)),
        graph.ksampler(model=load(graph, name, model=model, end=0.001)),
        graph.ksampler(model=load(graph, name, model=model, end=0.8)),
        graph.ksampler(model=model),
    )
    assert difference(plain, ranged) < SAME
    assert difference(plain, part) > SAME
    assert difference(none, part) > SAME


# --- 8-bit bases --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_bit(server, component):
    """eight_bit(format) -> name of a checkpoint whose blocks are stored in 8 bits with scales."""

    def write(kind):
        name = f"ernie-image-{kind}.safetensors"
        state, layers = dict(component.state_dict), {}
        for path, shape in weight_shapes(component.state_dict).items():
            if path.startswith("layers.") and len(shape) == 2:
                weight = state[f"{path}.weight"].float()
                if kind == "float8_e4m3fn":
                    stored, scale = quantise_fp8(weight)
                else:
                    scale = weight.abs().amax() / 127
                    stored = (weight / scale).round().clamp(-127, 127).to(torch.int8)
                state[f"{path}.weight"] = stored
                layers[path] = LayerQuantisation(options={"format": kind}, tensors={"weight_scale": scale})
        quantised = type(component)(
            kind="transformer", config=component.config, state_dict=state, source=component.source, quantisation=layers
        )
        save_single_file(quantised, server.base / "models" / "diffusion_models" / name)
        return name

    return write


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_on_8_bit_weights_it_acts_whole_and_in_a_range(kind, algorithm, eight_bit, latents, lora_file, record_property):
    graph, name = Graph(), lora_file(algorithm)
    model = graph.add("ErnieLoadDiffusionModel", model_name=eight_bit(kind), weight_dtype="default")
    strong = {"strength": 4.0}  # above the rounding of 8 bits, which the host repeats after patching
    models = [graph.model, load(graph, name, **strong), model, load(graph, name, model=model, **strong)]
    models.append(load(graph, name, model=model, end=0.001, **strong))
    # One step: what rounding does to a second one is no matter of LoRAs.
    none, full, none8, plain8, ranged8 = latents(graph, *(graph.ernie_sampler(model=m, steps=1) for m in models))
    effect = full - none
    for found in (plain8, ranged8):
        error = (found - none8 - effect).norm() / effect.norm()
        record_property("error of the effect", float(error))
        assert error < 0.5


# --- what it says -------------------------------------------------------------------------------------------


def test_the_node_says_what_matched(server, lora_file):
    graph = Graph()
    number, _ = load(graph, lora_file())
    shown = graph.add("PreviewAny", source=[number, 1])
    text = server.run(graph.prompt).outputs[shown[0]]["text"][0]
    assert text.startswith("49 of 49 matched\n49 LoRA; rank 4; dialect comfyui")


def test_a_lora_of_another_model_is_refused_by_name(server, lora_file):
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.add_q_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(64, 4)}
    save_file(tensors, server.base / "models" / "loras" / "foreign.safetensors")
    graph = Graph()
    link = graph.ernie_sampler(model=load(graph, "foreign.safetensors", allow_unmatched=True))
    graph.add("SaveLatent", samples=link, filename_prefix="test/foreign")
    with pytest.raises(HostError, match=r"0 of 1 adapted modules match this model.*LoRA for Qwen-Image"):
        server.run(graph.prompt)


def test_merging_writes_a_checkpoint_that_is_the_patched_model(server, latents, lora_file):
    graph = Graph()
    none = {"lora_2": "none", "strength_2": 1.0, "blocks_2": "", "lora_3": "none", "strength_3": 1.0, "blocks_3": ""}
    graph.add(
        "ErnieMergeLora",
        model_name="ernie-image.safetensors",
        lora_1=lora_file("dora"),
        strength_1=0.7,
        blocks_1="0:0.5",
        **none,
        allow_unmatched=False,
        name="merged/tiny",
        overwrite=True,
    )
    server.run(graph.prompt)
    file = server.base / "models" / "diffusion_models" / "merged" / "tiny.safetensors"
    assert file.is_file()
    graph = Graph()
    merged = graph.add("ErnieLoadDiffusionModel", model_name="merged/tiny.safetensors", weight_dtype="fp32")
    patched = load(graph, lora_file("dora"), strength=0.7, blocks="0:0.5")
    found, expected, none = latents(
        graph, *(graph.ernie_sampler(model=m, steps=1) for m in (merged, patched, graph.model))
    )
    # The tiny model's file holds bf16: merged weights are rounded to it.
    assert (found - expected).norm() < 0.05 * (none - expected).norm()
