"""Our nodes exchanged for their core counterparts, one by one: same latents where the mathematics is the same.

Latents are read back through core's SaveLatent, so they are compared as numbers, not as pictures.
"""

import math

import pytest
import torch
from comfyui_server import HostError
from ernie_pack.ernie_core.batch import read_image
from ernie_pack.ernie_core.weights.checkpoint import read_header, write_safetensors
from ernie_pack.standalone import host, load_node_classes
from ernie_pack.standalone.graph import Workflow, run_prompt, validate
from host_graph import SIDE_PX, STEPS, Graph, defaults, difference

pytestmark = pytest.mark.host

SAME = 2e-4  # fp32 rounding of another order of operations, summed over the steps


def test_ksampler_and_our_sampler_give_the_same_latents(latents):
    graph = Graph()
    core, ours = latents(graph, graph.ksampler(), graph.ernie_sampler())
    assert difference(core, ours) < SAME


def test_the_picture_is_the_one_that_standalone_makes(images, server, tmp_path, monkeypatch):
    """So the same seed is the same picture on every supported ComfyUI."""
    monkeypatch.setattr(host, "session", host.Session(models=server.base / "models", output=tmp_path))
    classes = load_node_classes()
    graph = Graph()
    picture = graph.add("VAEDecode", samples=graph.ernie_sampler(), vae=graph.vae)
    (there,) = images(graph, picture)
    here = Workflow(prompt=graph.prompt, page=None)
    validate(here.prompt, classes)
    run_prompt(here, classes)
    (file,) = host.session.saved
    assert (read_image(file) - there).abs().max() <= 2 / 255


def test_ksampler_starts_from_a_picture_as_our_sampler_does(latents):
    graph = Graph()
    graph.latent = graph.ernie_sampler(seed=1)
    core, ours = latents(graph, graph.ksampler(denoise=0.5, steps=4), graph.ernie_sampler(denoise=0.5, steps=4))
    assert difference(core, ours) < SAME


def test_clip_text_encode_and_encode_prompt_are_the_same(latents):
    graph = Graph()
    encoded = graph.add("CLIPTextEncode", clip=graph.clip, text="a red star")
    empty = graph.add("CLIPTextEncode", clip=graph.clip, text="")
    core, ours = latents(graph, graph.ernie_sampler(positive=encoded, negative=empty), graph.ernie_sampler())
    assert torch.equal(core, ours)


def test_combined_and_zeroed_conditionings_sample(latents, need):
    need("ConditioningZeroOut", "ConditioningCombine", "ConditioningSetTimestepRange")
    graph = Graph()
    other = graph.add("ErnieEncodePrompt", clip=graph.clip, prompt="a blue ring on the left")
    zero = graph.add("ConditioningZeroOut", conditioning=graph.positive)
    early = graph.add("ConditioningSetTimestepRange", conditioning=other, start=0.0, end=0.5)
    both = graph.add("ConditioningCombine", conditioning_1=graph.positive, conditioning_2=early)
    plain, mixed = latents(graph, graph.ernie_sampler(), graph.ernie_sampler(positive=both, negative=zero))
    assert difference(plain, mixed) > SAME


@pytest.mark.parametrize("kind", ["EmptyFlux2LatentImage", "EmptyLatentImage"])
def test_cores_empty_latents_are_ours(kind, latents, need):
    need(kind)
    graph = Graph()
    core = graph.add(kind, width=SIDE_PX, height=SIDE_PX, batch_size=1)
    first, second = latents(graph, graph.ernie_sampler(latent_image=core), graph.ernie_sampler())
    assert torch.equal(first, second)
    graph = Graph()
    core = graph.add(kind, width=SIDE_PX, height=SIDE_PX, batch_size=1)
    first, second = latents(graph, graph.ksampler(latent_image=core), graph.ksampler())
    assert torch.equal(first, second)


def test_tiled_decoding_gives_the_same_picture_where_one_tile_is_enough(images, need):
    need("VAEDecodeTiled")
    graph = Graph()
    latent = graph.ernie_sampler()
    whole = graph.add("VAEDecode", samples=latent, vae=graph.vae)
    tiled = graph.add(
        "VAEDecodeTiled", samples=latent, vae=graph.vae, tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8
    )
    first, second = images(graph, whole, tiled)
    assert (first - second).abs().max() <= 2 / 255


def test_tiles_are_blended(images, need):
    need("VAEDecodeTiled")
    graph = Graph()
    graph.latent = graph.add("ErnieEmptyLatent", size="custom", width=128, height=96, batch_size=1)
    latent = graph.ernie_sampler(steps=2)
    tiled = graph.add(
        "VAEDecodeTiled", samples=latent, vae=graph.vae, tile_size=64, overlap=32, temporal_size=64, temporal_overlap=8
    )
    (picture,) = images(graph, tiled)
    assert picture.shape == (96, 128, 3)
    assert picture.std() > 1e-3


@pytest.mark.parametrize("kind", ["VAEEncode", "VAEEncodeTiled"])
def test_an_encoded_picture_is_a_latent_of_ours(kind, latents, need):
    need(kind)
    graph = Graph()
    picture = graph.add("VAEDecode", samples=graph.ernie_sampler(), vae=graph.vae)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8} if "Tiled" in kind else {}
    encoded = graph.add(kind, pixels=picture, vae=graph.vae, **tiles)
    latent, core, ours = latents(
        graph,
        encoded,
        graph.ksampler(latent_image=encoded, denoise=0.5, steps=4),
        graph.ernie_sampler(latent_image=encoded, denoise=0.5, steps=4),
    )
    assert latent.shape == (1, 128, SIDE_PX // 16, SIDE_PX // 16)
    assert difference(core, ours) < SAME


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_model_sampling_sd3_shifts_as_our_sampler_does(shift, latents, need):
    need("ModelSamplingSD3")
    graph = Graph()
    shifted = graph.add("ModelSamplingSD3", model=graph.model, shift=shift)
    core, ours = latents(graph, graph.ksampler(model=shifted), graph.ernie_sampler(shift=shift))
    assert difference(core, ours) < SAME


def test_model_sampling_auraflow_shifts_and_says_that_it_is_scaled(latents, need, new_log):
    need("ModelSamplingAuraFlow")
    graph = Graph()
    shifted = graph.add("ModelSamplingAuraFlow", model=graph.model, shift=3.0)
    core, ours = latents(graph, graph.ksampler(model=shifted), graph.ernie_sampler(shift=3.0))
    assert difference(core, ours) < SAME
    assert new_log().count("they are scaled") == 1


def test_model_sampling_flux_shifts_and_says_that_it_is_scaled(latents, need, new_log):
    need("ModelSamplingFlux")
    graph = Graph()
    size = {"width": SIDE_PX, "height": SIDE_PX}
    shifted = graph.add("ModelSamplingFlux", model=graph.model, max_shift=1.1, base_shift=1.1, **size)
    core, ours = latents(graph, graph.ksampler(model=shifted), graph.ernie_sampler(shift=math.exp(1.1)))
    assert difference(core, ours) < 10 * SAME  # its table of sigmas has other entries
    assert new_log().count("they are scaled") == 1


def test_our_sigmas_drive_cores_custom_sampler(latents, need):
    need("SamplerCustomAdvanced", "CFGGuider", "KSamplerSelect", "RandomNoise")
    graph = Graph()
    sigmas = graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0)
    core, ours = latents(graph, graph.custom_sampler(sigmas), graph.ernie_sampler())
    assert difference(core, ours) < SAME


def test_cores_scheduler_reads_our_models_shift(latents, need):
    need("SamplerCustomAdvanced", "BasicScheduler")
    graph = Graph()
    sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=STEPS, denoise=1.0)
    core, ours = latents(graph, graph.custom_sampler(sigmas), graph.ernie_sampler())
    assert difference(core, ours) < SAME


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "uni_pc", "res_multistep"])
def test_cores_other_samplers_run(sampler, latents):
    graph = Graph()
    (latent,) = latents(graph, graph.ksampler(sampler_name=sampler))
    assert latent.isfinite().all()
    assert latent.std() > 1e-3


@pytest.fixture(scope="module")
def lora_file(server):
    """Write a rank-2 LoRA over two modules under the given prefix; returns its name in ComfyUI's list."""
    model = server.base / "models" / "diffusion_models" / "ernie-image.safetensors"
    shapes, _ = read_header(model)
    modules = ("layers.0.self_attention.to_q", "layers.1.mlp.linear_fc2")
    folder = server.base / "models" / "loras"

    def write(prefix, *, scale):
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for module in modules:
            rows, columns = shapes[f"{module}.weight"]
            key = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
            tensors[f"{key}.lora_up.weight"] = scale * torch.randn(rows, 2, generator=generator)
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        name = f"{prefix.strip('._')}-{scale:g}.safetensors"
        write_safetensors(tensors, folder / name)
        return name

    return write


def with_lora(graph, name, strength=1.0):
    return graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=name, strength_model=strength)


def test_every_key_dialect_of_a_lora_reaches_the_model(latents, lora_file, new_log):
    files = [lora_file(prefix, scale=0.05) for prefix in ("diffusion_model.", "transformer.", "lora_unet_")]
    zero = lora_file("diffusion_model.", scale=0.0)
    graph = Graph()
    plain, *found, nothing, off = latents(
        graph,
        graph.ernie_sampler(),
        *(graph.ernie_sampler(model=with_lora(graph, name)) for name in files),
        graph.ernie_sampler(model=with_lora(graph, zero)),
        graph.ernie_sampler(model=with_lora(graph, files[0], strength=0.0)),
    )
    assert difference(plain, found[0]) > 10 * SAME, "the LoRA changed nothing"
    for other in found[1:]:
        assert difference(found[0], other) < SAME
    assert difference(plain, nothing) < SAME
    assert torch.equal(plain, off)
    assert "lora key not loaded" not in new_log()


def test_a_lora_works_the_same_under_ksampler(latents, lora_file):
    name = lora_file("diffusion_model.", scale=0.05)
    graph = Graph()
    model = with_lora(graph, name)
    core, ours = latents(graph, graph.ksampler(model=model), graph.ernie_sampler(model=model))
    assert difference(core, ours) < SAME


@pytest.mark.parametrize("own_sampler", [False, True], ids=["KSampler", "ErnieSampler"])
def test_easycache_skips_steps_of_our_model(own_sampler, latents, need, new_log):
    need("EasyCache")
    graph = Graph()
    cached = graph.add(
        "EasyCache", model=graph.model, reuse_threshold=3.0, start_percent=0.1, end_percent=0.95, verbose=True
    )
    sample = graph.ernie_sampler if own_sampler else graph.ksampler
    plain, quick = latents(graph, sample(steps=20), sample(model=cached, steps=20))
    assert difference(plain, quick) > 0
    assert "EasyCache - skipping step" in new_log() or "EasyCache [verbose] - skipping step" in new_log()


def test_trainloranode_trains_a_lora_that_changes_the_picture(latents, need, nodes, server):
    need("TrainLoraNode", "LoraModelLoader", "SaveLoRA")
    graph = Graph()
    target = graph.ernie_sampler(seed=1)
    settings = {
        "model": graph.model,
        "latents": target,
        "positive": graph.positive,
        "steps": 3,
        "learning_rate": 0.05,
        "rank": 2,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
    }
    trained = graph.add("TrainLoraNode", **defaults(nodes, "TrainLoraNode", **settings))
    lora = [trained[0], output_index(nodes, "TrainLoraNode", "LORA_MODEL")]
    graph.add("SaveLoRA", **defaults(nodes, "SaveLoRA", lora=lora, prefix="test/trained"))
    patched = graph.add("LoraModelLoader", **defaults(nodes, "LoraModelLoader", model=graph.model, lora=lora))
    before, after = latents(graph, graph.ernie_sampler(), graph.ernie_sampler(model=patched))
    assert difference(before, after) > SAME
    assert list((server.base / "output" / "test").glob("trained*.safetensors"))


def output_index(nodes, kind, wanted):
    return nodes[kind]["output"].index(wanted)


def test_a_latent_of_another_model_is_refused_by_name(server):
    tensors = {"latent_tensor": torch.ones(1, 16, 8, 8), "latent_format_version_0": torch.tensor([])}
    write_safetensors(tensors, server.base / "input" / "foreign.latent")
    graph = Graph()
    foreign = graph.add("LoadLatent", latent="foreign.latent")
    graph.add("SaveLatent", samples=graph.ernie_sampler(latent_image=foreign), filename_prefix="test/never")
    with pytest.raises(HostError, match="it is another model's"):
        server.run(graph.prompt)
