"""The inpainting nodes: what reaches the host, neutral settings, every widget, bad input; on a network in miniature."""

import logging

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.model.dit import DiT
from ernie_pack.ernie_core.sampling import inpaint
from ernie_pack.ernie_core.sampling.guidance import Rescale
from ernie_pack.ernie_core.sampling.langevin import InnerIterations
from ernie_pack.ernie_core.sampling.schedule import make_sigmas
from ernie_pack.standalone import host, load_node_classes
from random_models import DIT, random_weights

PREPARE = {"left": 0, "top": 0, "right": 0, "bottom": 0, "grow": 0, "feather": 0}
PREPARE |= {"fill": "original", "crop": False, "context": 8, "size": 32}
HARD = {"iterations": 3, "evidence": 2.0, "step": 0.5, "start": 1.0, "end": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def model():
    dit = DiT(DIT)
    dit.load_state_dict({n: t.float() for n, t in random_weights(dit.state_dict(), seed=3).items()})
    return host.Model(dit=dit.eval())


def text(seed, tokens=3):
    return [[torch.randn(1, tokens, DIT.text_in_dim, generator=torch.Generator().manual_seed(seed)), {}]]


def latent(mask=None, batch=1):
    samples = torch.randn(batch, 128, 3, 4, generator=torch.Generator().manual_seed(9))
    return {"samples": samples} | ({} if mask is None else {"noise_mask": mask})


def half():
    mask = torch.zeros(1, 1, 3, 4)
    mask[..., 2:] = 1
    return mask


def sample(model, start, *, cfg=4.0, seed=3):
    return host.sample(
        model,
        positive=text(1),
        negative=text(2, tokens=2),
        latent=start,
        sigmas=make_sigmas(4),
        cfg=cfg,
        seed=seed,
    )["samples"]


def hard(model, **changes):
    return load_node_classes()["ErnieHardInpaint"].execute(model=model, **HARD | changes)[0]


def picture():
    return torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0))


def mask():
    found = torch.zeros(1, 48, 64)
    found[:, 18:28, 20:30] = 1
    return found


def test_the_choices_are_the_engines(node_classes, recording):
    choices = {
        item.id: tuple(item.as_dict()["options"])
        for name in ("ErnieInpaintPrepare", "ErnieInpaintStitch")
        for item in node_classes[name].GET_SCHEMA().inputs
        if item.get_io_type() == "COMBO"
    }
    assert choices == {"fill": inpaint.FILLS, "colour_match": inpaint.COLOUR_MATCHES}


def test_prepare_encodes_what_is_painted_and_hands_on_its_mask(run, recording):
    made, stitch, image, cells = run("ErnieInpaintPrepare", image=picture(), vae="VAE", mask=mask(), **PREPARE).result
    assert recording.calls == [("encode", "VAE", picture().tolist())]
    assert torch.equal(image, picture())
    assert made["noise_mask"].shape == (1, 1, 3, 4)
    assert made["noise_mask"][0, 0].nonzero().tolist() == [[1, 1]]
    assert cells.shape == (1, 48, 64)
    assert torch.equal(run("ErnieInpaintStitch", image=image, stitch=stitch, colour_match="off").result[0], picture())


def results(run, **changes):
    given = {"image": picture(), "vae": "VAE", "mask": mask()} | PREPARE | changes
    made, stitch, image, cells = run("ErnieInpaintPrepare", **given).result
    painted = torch.full_like(image, 0.25)
    laid = run("ErnieInpaintStitch", image=painted, stitch=stitch, colour_match="off").result[0]
    return [value.tolist() for value in (made["noise_mask"], image, cells, laid)]


@pytest.mark.parametrize(
    ("widget", "value", "context"),
    [
        ("left", 16, {}),
        ("top", 16, {}),
        ("right", 16, {}),
        ("bottom", 16, {}),
        ("grow", 5, {}),
        ("feather", 6, {}),
        ("fill", "grey", {}),
        ("crop", True, {}),
        ("context", 0, {"crop": True, "size": 0}),
        ("size", 64, {"crop": True}),
    ],
)
def test_every_widget_of_prepare_matters(run, recording, widget, value, context):
    assert results(run, **context) != results(run, **context, **{widget: value})


def test_the_widget_of_stitch_matters(run, recording):
    _, stitch, image, _ = run("ErnieInpaintPrepare", image=picture(), vae="VAE", mask=mask(), **PREPARE).result
    painted = image * 0.5
    laid = [
        run("ErnieInpaintStitch", image=painted, stitch=stitch, colour_match=how).result[0]
        for how in inpaint.COLOUR_MATCHES
    ]
    assert not torch.equal(laid[0], laid[1])
    assert not torch.equal(laid[1], laid[2])


def test_hard_inpaint_hands_over_its_settings(run, recording):
    run("ErnieHardInpaint", model="MODEL", **HARD)
    assert recording.calls == [("set_inner_iterations", "MODEL", InnerIterations(iterations=3, evidence=2.0, step=0.5))]


@pytest.mark.parametrize("changes", [{"iterations": 0}, {"start": 0.4, "end": 0.4}], ids=["none", "nowhere"])
def test_neutral_settings_are_the_model_itself(model, changes):
    assert hard(model, **changes) is model


@pytest.mark.parametrize("start", [latent(), latent(torch.ones(1, 1, 48, 64))], ids=["no mask", "all ones"])
def test_with_nothing_to_keep_it_is_plain_sampling_bit_for_bit(model, start):
    plain = sample(model, latent())
    assert torch.equal(sample(model, start), plain)
    assert torch.equal(sample(hard(model), start), plain)


def test_zeros_keep_the_picture(model):
    start = latent(torch.zeros(1, 1, 3, 4))
    for patched in (model, hard(model)):
        torch.testing.assert_close(sample(patched, start), start["samples"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"iterations": 1}, {"evidence": 0.0}, {"step": 0.1}, {"start": 0.8}, {"end": 0.8}, {"seed": 1}],
    ids=lambda c: next(iter(c)),
)
def test_each_widget_of_hard_inpaint_acts_and_leaves_the_model_as_it_was(model, changes):
    start, plain = latent(half()), sample(model, latent(half()))
    patched = sample(hard(model), start)
    assert not torch.allclose(patched, plain, atol=1e-3)
    assert not torch.allclose(sample(hard(model, **changes), start), patched, atol=1e-3)
    assert torch.equal(sample(hard(model), start), patched)
    assert torch.equal(sample(model, start), plain)
    torch.testing.assert_close(patched[..., :2], start["samples"][..., :2], rtol=0, atol=1e-5)


def test_the_later_of_two_replaces_the_earlier(model):
    start = latent(half())
    twice = hard(hard(model, iterations=5, seed=4))
    assert torch.equal(sample(twice, start), sample(hard(model), start))


def test_it_acts_together_with_guidance(model):
    start = latent(half())
    guided = host.add_guidance(model, [Rescale(share=0.7)])
    both, other_way = hard(guided), host.add_guidance(hard(model), [Rescale(share=0.7)])
    assert torch.equal(sample(both, start), sample(other_way, start))
    assert not torch.allclose(sample(both, start), sample(hard(model), start), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 101}, r"iterations must lie between 0 and 100 \(0 = plain masking\), got 101"),
        ({"evidence": float("nan")}, r"evidence must lie between 0 and 20"),
        ({"step": 0.0}, r"step must lie between 0.01 and 5"),
        ({"start": 0.2, "end": 0.5}, r"start must not be below end"),
    ],
)
def test_bad_settings_are_refused(model, changes, message):
    with pytest.raises(ErnieError, match=message):
        hard(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(1, 8, 8)}, r"a mask of the picture's size, 64 x 48, expected, got 8 x 8"),
        ({"mask": torch.full((1, 48, 64), float("nan"))}, r"a mask of finite numbers expected"),
        ({"image": torch.full((1, 48, 64, 3), float("nan"))}, r"a picture of finite numbers expected"),
        ({"size": 10_000, "crop": True}, r"a part of at most 8192 pixels a side expected"),
    ],
)
def test_bad_pictures_are_refused_before_they_are_encoded(run, recording, changes, message):
    with pytest.raises(ErnieError, match=message):
        run("ErnieInpaintPrepare", **({"image": picture(), "vae": "VAE", "mask": mask()} | PREPARE | changes))
    assert not recording.calls


def test_another_pictures_stitch_is_refused(run, recording):
    _, stitch, _, _ = run("ErnieInpaintPrepare", image=picture(), vae="VAE", mask=mask(), **PREPARE).result
    with pytest.raises(ErnieError, match=r"a picture of 64 x 48, as Inpaint Prepare made it, expected, got 32 x 32"):
        run("ErnieInpaintStitch", image=torch.zeros(1, 32, 32, 3), stitch=stitch, colour_match="off")


def test_an_empty_mask_says_so(run, recording, caplog):
    with caplog.at_level(logging.WARNING):
        run("ErnieInpaintPrepare", image=picture(), vae="VAE", mask=torch.zeros(1, 64, 64), **PREPARE)
    assert "The mask is empty" in caplog.text
