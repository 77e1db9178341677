"""Our samplers on the real host: in our node, in core's SamplerCustomAdvanced, and as standalone runs them."""

import json

import pytest
import torch
from ernie_pack.ernie_core.config import SAMPLERS
from ernie_pack.standalone import host, load_node_classes
from ernie_pack.standalone.graph import Workflow, run_prompt, validate
from host_graph import STEPS, Graph, difference
from small_runs import ROOT

pytestmark = pytest.mark.host

SAME = 2e-4  # fp32 rounding of another order of operations, summed over the steps


def advanced(graph, seed=7, eta=1.0, **settings):
    """Core's custom sampling with our SAMPLER, on the same noise and schedule as `Graph.ernie_sampler`."""
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=seed),
        guider=graph.add("CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=4.0),
        sampler=graph.add("ErnieSamplerSelect", eta=eta, **settings),
        sigmas=graph.add("ErnieSigmas", steps=STEPS, shift=4.0, denoise=1.0),
        latent_image=graph.latent,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_our_sampler_and_cores_custom_sampling_are_one(name, latents):
    graph = Graph()
    ours, custom = latents(graph, graph.ernie_sampler(sampler=name), advanced(graph, sampler=name))
    assert torch.equal(ours, custom)


def test_heun_is_cores_and_dpmpp_2m_is_not(latents):
    """As the help page says; core's counts time in minus the logarithm of the noise level."""
    graph = Graph()
    links = []
    for name in ("heun", "dpmpp_2m"):
        links.append(advanced(graph, sampler=name))
        other = dict(graph.prompt[links[-1][0]]["inputs"], sampler=graph.add("KSamplerSelect", sampler_name=name))
        links.append(graph.add("SamplerCustomAdvanced", **other))
    heun, cores_heun, dpmpp, cores_dpmpp = latents(graph, *links)
    assert difference(heun, cores_heun) < SAME
    assert difference(dpmpp, cores_dpmpp) > 10 * SAME


def test_without_the_input_it_is_euler_bit_for_bit(latents):
    graph = Graph()
    before, euler, heun = latents(
        graph, graph.ernie_sampler(), graph.ernie_sampler(sampler="euler"), graph.ernie_sampler(sampler="heun")
    )
    assert torch.equal(before, euler)
    assert difference(euler, heun) > SAME


@pytest.mark.parametrize(
    ("name", "twin"), [("euler_ancestral", "euler"), ("dpmpp_2m_sde", "dpmpp_2m")], ids=lambda v: v
)
def test_eta_0_draws_no_noise(name, twin, latents):
    graph = Graph()
    none, twin, some = latents(
        graph,
        advanced(graph, sampler=name, eta=0.0),
        advanced(graph, sampler=twin),
        advanced(graph, sampler=name, eta=0.5),
    )
    assert torch.equal(none, twin)
    assert difference(none, some) > SAME


def test_the_first_picture_of_a_batch_is_the_picture_alone(latents):
    graph = Graph()
    (alone,) = latents(graph, graph.ernie_sampler(sampler="euler_ancestral"))
    graph.latent = graph.add("ErnieEmptyLatent", size="custom", width=64, height=64, batch_size=3)
    (batch,) = latents(graph, graph.ernie_sampler(sampler="euler_ancestral"))
    assert difference(batch[:1], alone) < SAME
    picked = graph.add(
        "LatentFromBatch",
        samples=graph.latent,
        batch_index=2,
        length=1,
    )
    (third,) = latents(graph, graph.ernie_sampler(sampler="euler_ancestral", latent_image=picked))
    assert difference(batch[2:], third) < SAME


@pytest.mark.parametrize("name", SAMPLERS)
def test_standalone_makes_the_same_latent(name, latents, server, tmp_path, monkeypatch):
    graph = Graph()
    link = graph.ernie_sampler(sampler=name)
    (there,) = latents(graph, link)
    monkeypatch.setattr(host, "session", host.Session(models=server.base / "models", output=tmp_path))
    classes = load_node_classes()
    kept = []
    decode = host.decode
    monkeypatch.setattr(host, "decode", lambda vae, latent: kept.append(latent["samples"]) or decode(vae, latent))
    here = Graph()
    picture = here.add("VAEDecode", samples=here.ernie_sampler(sampler=name), vae=here.vae)
    here.add("SaveImage", images=picture, filename_prefix="x")
    validate(here.prompt, classes)
    run_prompt(Workflow(prompt=here.prompt, page=None), classes)
    assert difference(kept[0], there) < 10 * SAME


def test_the_bar_in_the_log_counts_calls(server, latents, new_log):
    graph = Graph()
    latents(graph, graph.ernie_sampler(sampler="heun"))
    assert f"{2 * STEPS - 1}/{2 * STEPS - 1}" in new_log()


def test_the_page_opens_a_file_from_before_the_widget(browser, tmp_path):
    """Its place in the saved values is empty: the page fills in the default."""
    page = json.loads((ROOT / "workflows" / "text_to_image.json").read_text(encoding="utf-8"))
    (node,) = (node for node in page["nodes"] if node["type"] == "ErnieSampler")
    assert node["widgets_values"].pop() == "euler"
    file = tmp_path / "older.json"
    file.write_text(json.dumps(page), encoding="utf-8")
    seen = browser.open_workflow(file)
    assert seen.problems == []
    (inputs,) = (node["inputs"] for node in seen.prompt.values() if node["class_type"] == "ErnieSampler")
    assert (inputs["sampler"], inputs["denoise"]) == ("euler", 1)
