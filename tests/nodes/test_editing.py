"""Editing nodes: what reaches the engine, and that neutral settings give the picture back, on the tiny model."""

from types import SimpleNamespace

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError, Interrupted
from ernie_pack.ernie_core.sampling import flow_edit as engine
from ernie_pack.ernie_core.sampling.experts import Band, Expert
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.standalone import host
from ernie_pack.standalone.core_nodes import RandomNoiseSource

LATENT = {"samples": torch.zeros(1, 128, 2, 2)}
SOURCE, TARGET, EMPTY = [["source", {}]], [["target", {}]], [["", {}]]
EDIT = {"strength": 0.8, "steps": 6, "cfg": 4.0, "source_cfg": 1.5, "shift": 4.0, "seed": 5, "repeat": 1}
VARY = {"strength": 0.3, "steps": 6, "cfg": 4.0, "shift": 4.0, "seed": 5, "iterations": 1}


def words(run, **changes):
    sockets = {"model": "MODEL", "latent": LATENT, "source": SOURCE, "target": TARGET, "negative": EMPTY}
    return run("ErnieEditWords", **(sockets | {"method": "flow edit"} | EDIT | changes))


def variation(run, **changes):
    sockets = {"model": "MODEL", "latent": LATENT, "positive": SOURCE, "negative": EMPTY}
    return run("ErnieVariation", **(sockets | VARY | changes))


def asked(recording):
    (call,) = [c for c in recording.calls if c[0] == "sample_branches"]
    return SimpleNamespace(**dict(zip(("model", "branches", "shape", "sigmas", "run", "steps"), call[1:], strict=True)))


def test_both_prompts_are_asked_with_their_own_cfg(run, recording):
    words(run)
    call = asked(recording)
    assert call.branches == {"source": (SOURCE, EMPTY, 1.5), "target": (TARGET, EMPTY, 4.0)}
    assert call.sigmas == make_sigmas(6, shift=4.0, denoise=0.8).tolist()
    assert ("set_shift", "MODEL", 4.0) in recording.calls


@pytest.mark.parametrize(
    ("method", "function", "steps"),
    [("flow edit", engine.flow_edit, 6), ("inversion", engine.edit_by_inversion, 12)],
)
def test_the_method_chooses_the_function(run, recording, method, function, steps):
    words(run, method=method, repeat=3)
    call = asked(recording)
    assert call.run.func is function
    assert 3 in (call.run.keywords.get("repeats"), call.run.keywords.get("iterations"))
    assert call.steps == steps


def test_a_variation_asks_one_prompt(run, recording):
    variation(run, iterations=2)
    call = asked(recording)
    assert call.branches == {"source": (SOURCE, EMPTY, 4.0)}
    assert call.run.func is engine.vary
    assert (call.run.keywords["strength"], call.run.keywords["iterations"]) == (0.3, 2)


def reached(run, recording, node_id, **changes):
    """All that a node hands on: what the host gets, and the noise that is drawn."""
    recording.calls.clear()
    sockets = {"model": "MODEL", "latent": LATENT, "negative": EMPTY}
    if node_id == "ErnieEditWords":
        sockets |= {"source": SOURCE, "target": TARGET, "method": "flow edit"} | EDIT
    else:
        sockets |= {"positive": SOURCE} | VARY
    if node_id == "ErnieInvertPicture":
        sockets = {name: value for name, value in sockets.items() if name not in ("strength", "seed")}
    run(node_id, **(sockets | changes))
    call = asked(recording)
    settings = dict(call.run.keywords)
    draw = settings.pop("draw", None)
    drawn = None if draw is None else draw(LATENT["samples"])[0, 0].tolist()
    rest = {name: value for name, value in settings.items() if name != "sigmas"}
    return call.branches, call.sigmas, call.steps, call.run.func, rest, drawn, recording.calls[:1]


@pytest.mark.parametrize(
    ("node_id", "widget", "value"),
    [
        *(("ErnieEditWords", name, value) for name, value in {"method": "inversion", "strength": 0.5}.items()),
        *(("ErnieEditWords", name, value) for name, value in {"steps": 7, "cfg": 2.0, "source_cfg": 2.0}.items()),
        *(("ErnieEditWords", name, value) for name, value in {"shift": 3.0, "seed": 6, "repeat": 2}.items()),
        *(("ErnieVariation", name, value) for name, value in {"strength": 0.5, "seed": 6, "steps": 7}.items()),
        *(("ErnieVariation", name, value) for name, value in {"cfg": 2.0, "shift": 3.0, "iterations": 2}.items()),
        *(("ErnieInvertPicture", name, value) for name, value in {"steps": 7, "cfg": 2.0}.items()),
        *(("ErnieInvertPicture", name, value) for name, value in {"shift": 3.0, "iterations": 2}.items()),
    ],
)
def test_every_widget_matters(run, recording, node_id, widget, value):
    assert reached(run, recording, node_id) != reached(run, recording, node_id, **{widget: value})


@pytest.mark.parametrize("changes", [{"cfg": 1.0}, {"source_cfg": 1.0}, {}])
def test_guidance_without_a_negative_is_an_error(run, recording, changes):
    with pytest.raises(ErnieError, match="compares with a negative prompt, but the input negative is not connected"):
        words(run, negative=None, **changes)
    assert not recording.calls


def test_turbo_needs_no_negative(run, recording):
    words(run, negative=None, cfg=1.0, source_cfg=1.0)
    assert asked(recording).branches["target"] == (TARGET, None, 1.0)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(run, recording, strength):
    with pytest.raises(ErnieError, match="must lie between 0"):
        words(run, strength=strength)
    with pytest.raises(ErnieError, match="strength must lie between 0"):
        run("ErnieMixNoise", first=None, second=None, strength=strength)


def test_mixed_noise_is_that_of_the_engine(run):
    first, second = RandomNoiseSource(seed=1), RandomNoiseSource(seed=2)
    latent = {"samples": torch.zeros(2, 128, 4, 4)}
    a, b = first.generate_noise(latent), second.generate_noise(latent)
    for strength, expected in ((0.0, a), (1.0, b), (0.5, 0.5**0.5 * (a + b))):
        (noise,) = run("ErnieMixNoise", first=first, second=second, strength=strength).result
        torch.testing.assert_close(noise.generate_noise(latent), expected)
    assert noise.seed == 1


# --- on the tiny model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from ernie_pack.ernie_core.weights.checkpoint import read_component

    folder = host.TINY_FOLDER
    model = host.make_model(read_component(folder, "transformer"), weight_dtype="fp32")
    clip = host.make_clip(read_component(folder, "text_encoder"), rope="yarn")

    def encode(text):
        return host.encode_prompt(clip, text)

    source, negative = encode("a large red star in the center on a sky background"), encode("")
    latent = host.sample(
        model,
        positive=source,
        negative=negative,
        latent=host.empty_latent(64, 64, 1),
        sigmas=make_sigmas(4),
        cfg=4.0,
        seed=3,
    )
    return SimpleNamespace(model=model, encode=encode, source=source, negative=negative, latent=latent)


@pytest.fixture
def real(node_classes, tiny):
    """real(node_id, **changes) -> first output, with the tiny model on every socket."""

    def call(node_id, **changes):
        sockets = {"model": tiny.model, "latent": tiny.latent, "negative": tiny.negative}
        if node_id == "ErnieEditWords":
            target = tiny.encode("a large blue star in the center on a sky background")
            sockets |= {"source": tiny.source, "target": target, "method": "flow edit"} | EDIT
        else:
            sockets |= {"positive": tiny.source} | VARY
        if node_id == "ErnieInvertPicture":
            sockets = {k: v for k, v in sockets.items() if k not in ("strength", "seed")}
        clone = node_classes[node_id].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return clone.EXECUTE_NORMALIZED(**(sockets | changes)).result[0]

    return call


def test_neutral_settings_give_the_picture_back_bit_for_bit(real, tiny):
    same = {"target": tiny.source, "source_cfg": 4.0}
    for edited in (
        real("ErnieEditWords", strength=0.0),
        real("ErnieEditWords", **same),
        real("ErnieVariation", strength=0.0),
    ):
        assert torch.equal(edited["samples"], tiny.latent["samples"])


def test_a_word_and_a_seed_change_the_picture(real, tiny):
    for edited in (real("ErnieEditWords"), real("ErnieEditWords", method="inversion"), real("ErnieVariation")):
        assert edited["samples"].shape == tiny.latent["samples"].shape
        assert (edited["samples"] - tiny.latent["samples"]).abs().mean() > 0.01


def test_a_noise_mask_keeps_the_rest_bit_for_bit(real, tiny):
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    for node_id in ("ErnieEditWords", "ErnieVariation"):
        edited = real(node_id, latent={**tiny.latent, "noise_mask": mask})["samples"]
        assert torch.equal(edited[..., 2:], tiny.latent["samples"][..., 2:])
        assert not torch.equal(edited[..., :2], tiny.latent["samples"][..., :2])


def test_the_noise_of_a_picture_paints_it_again(real, tiny):
    noise = real("ErnieInvertPicture", cfg=1.0, steps=40, iterations=2).generate_noise(tiny.latent)
    painted, _ = host.sample_from_noise(
        tiny.model,
        positive=tiny.source,
        negative=None,
        latent=tiny.latent,
        sigmas=make_sigmas(40),
        cfg=1.0,
        noise=noise,
    )
    near = float((painted - tiny.latent["samples"]).abs().mean())
    assert near < 0.05 < 3 * float(tiny.latent["samples"].abs().mean())


def test_noise_of_another_size_is_refused(real, tiny):
    noise = real("ErnieInvertPicture", steps=1)
    with pytest.raises(ErnieError, match=r"found for a latent \[1, 128, 4, 4\], the latent here is \[1, 128, 2, 2\]"):
        noise.generate_noise(LATENT)


def test_a_masked_picture_has_no_noise_of_its_own(real, tiny):
    with pytest.raises(ErnieError, match="has a noise mask: take it off"):
        real("ErnieInvertPicture", latent={**tiny.latent, "noise_mask": torch.ones(1, 1, 4, 4)})


@pytest.mark.parametrize("node_id", ["ErnieEditWords", "ErnieVariation", "ErnieInvertPicture"])
def test_bad_latents_and_prompts_are_named(real, tiny, node_id):
    with pytest.raises(ErnieError, match=r"a latent \[batch, 128"):
        real(node_id, latent={"samples": torch.zeros(1, 16, 4, 4)})
    with pytest.raises(ErnieError, match="finite"):
        real(node_id, latent={"samples": torch.full((1, 128, 4, 4), float("nan"))})
    prompt = "target" if node_id == "ErnieEditWords" else "positive"
    with pytest.raises(ErnieError, match="another model's text encoder"):
        real(node_id, **{prompt: [[torch.zeros(1, 3, 7), {}]]})


@pytest.mark.parametrize("node_id", ["ErnieEditWords", "ErnieVariation", "ErnieInvertPicture"])
def test_an_interrupt_stops_it(real, tiny, node_id, monkeypatch):
    monkeypatch.setattr(host.session, "interrupted", True)
    with pytest.raises(Interrupted):
        real(node_id, steps=1000)


# --- style statistics ------------------------------------------------------------------------------------------------

REFERENCE = {"samples": torch.randn(1, 128, 3, 5, generator=torch.Generator().manual_seed(9)) + 0.5}


@pytest.fixture
def paint(node_classes, tiny):
    """paint(model) -> samples of the tiny model's usual picture."""

    def run(model):
        return host.sample(
            model,
            positive=tiny.source,
            negative=tiny.negative,
            latent=host.empty_latent(64, 64, 1),
            sigmas=make_sigmas(4),
            cfg=4.0,
            seed=3,
        )["samples"]

    return run


@pytest.fixture
def styled(node_classes, tiny):
    def run(**changes):
        sockets = {"model": tiny.model, "latent": REFERENCE, "strength": 0.5, "start": 1.0, "end": 0.6}
        clone = node_classes["ErnieStyleStatistics"].PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        return clone.EXECUTE_NORMALIZED(**(sockets | changes)).result[0]

    return run


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"end": 1.0}, {"start": 0.6}])
def test_neutral_statistics_are_the_model_itself(styled, tiny, changes):
    assert styled(**changes) is tiny.model


def test_statistics_move_the_picture_towards_the_reference(styled, paint, tiny):
    def far(samples):
        return float((samples.mean((2, 3)) - REFERENCE["samples"].mean((2, 3))).abs().mean())

    distances = [far(paint(styled(strength=strength, end=0.0))) for strength in (0.0, 0.5, 1.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 1e-4  # the last estimate is the picture
    assert torch.equal(tiny.latent["samples"], paint(styled(strength=0.0)))


def test_several_statistics_act_in_their_order(styled, paint):
    other = {"samples": -REFERENCE["samples"]}
    last = paint(styled(model=styled(latent=other), strength=1.0, end=0.0))
    torch.testing.assert_close(last.mean((2, 3)), REFERENCE["samples"].mean((2, 3)), rtol=0, atol=1e-4)


def test_statistics_act_on_the_source_of_an_edit_too(real, styled, tiny):
    """Both sides of the walk are moved alike, so equal prompts still give the picture back."""
    same = {"target": tiny.source, "source_cfg": 4.0}
    assert torch.equal(real("ErnieEditWords", model=styled(), **same)["samples"], tiny.latent["samples"])


def test_statistics_of_a_mixture_act_on_all_experts_and_an_experts_own_are_named(styled, paint, tiny, caplog):
    def mixture(base, expert):
        return host.set_experts(base, [Expert(band=Band(start=1.0, end=0.9), model=expert)])

    assert torch.equal(paint(mixture(styled(), tiny.model)), paint(styled()))
    assert not caplog.records
    assert torch.equal(paint(mixture(tiny.model, styled())), tiny.latent["samples"])
    assert "style statistics on the model of the expert for noise levels 1 to 0.9 are not used" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": {"samples": torch.zeros(1, 16, 2, 2)}}, r"a latent \[batch, 128"),
        ({"latent": {"samples": torch.full((1, 128, 2, 2), float("nan"))}}, "finite"),
        ({"latent": {"samples": torch.zeros(2, 128, 2, 2)}}, "one reference picture expected"),
        ({"strength": 1.5}, "strength must lie between 0 and 1"),
        ({"start": 0.2}, "start must not be below end"),
    ],
)
def test_bad_references_and_settings_are_named(styled, changes, message):
    with pytest.raises(ErnieError, match=message):
        styled(**changes)
