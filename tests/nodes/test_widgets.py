"""Every widget matters: moving it off its default changes what reaches the host or comes out of the node."""

import pytest

# Sockets, and the settings under which a widget is read.
SOCKETS = {
    "ErnieEncodePrompt": {"clip": "CLIP"},
    "ErnieSampler": {"model": "MODEL", "positive": [["p", {}]], "negative": [["n", {}]]},
    "ErnieBatchFromPrompts": {"model": "MODEL", "clip": "CLIP", "vae": "VAE"},
}
CONTEXT = {
    ("ErnieEmptyLatent", "width"): {"size": "custom"},
    ("ErnieEmptyLatent", "height"): {"size": "custom"},
    ("ErnieSampler", "steps"): {"preset": "custom"},
    ("ErnieSampler", "cfg"): {"preset": "custom"},
    ("ErnieBatchFromPrompts", "steps"): {"preset": "custom"},
    ("ErnieBatchFromPrompts", "cfg"): {"preset": "custom"},
}
DEFAULT_TEXT = {"source": "one\ntwo"}
OTHER_TEXT = {"source": "one", "name": "elsewhere"}

WIDGETS = [
    *[("ErnieLoadDiffusionModel", w) for w in ("model_name", "weight_dtype")],
    *[("ErnieLoadTextEncoder", w) for w in ("encoder_name", "rope")],
    ("ErnieLoadPromptEnhancer", "enhancer_name"),
    *[("ErnieLoadVAE", w) for w in ("vae_name", "weight_dtype")],
    ("ErnieEncodePrompt", "prompt"),
    *[("ErnieEnhancePrompt", w) for w in ("prompt", "enabled", "width", "height", "seed", "temperature", "top_p")],
    *[("ErnieEnhancePrompt", w) for w in ("top_k", "min_p", "repetition_penalty", "max_new_tokens")],
    *[("ErnieEmptyLatent", w) for w in ("size", "width", "height", "batch_size")],
    *[("ErnieSampler", w) for w in ("preset", "steps", "cfg", "shift", "seed", "denoise")],
    *[("ErnieSigmas", w) for w in ("steps", "shift", "denoise")],
    *[("ErnieBatchFromPrompts", w) for w in ("source", "name", "negative", "width", "height", "preset", "steps")],
    *[("ErnieBatchFromPrompts", w) for w in ("cfg", "shift", "seed", "collect")],
    *[("ErnieLoadImageModel", w) for w in ("weight_dtype", "rope", "load_enhancer")],
]


def default(item):
    settings = item.as_dict()
    value = settings.get("default", settings["options"][0] if "options" in settings else None)
    return DEFAULT_TEXT.get(item.id, value)


def another(item, value):
    """A legal value of the widget that is not `value`."""
    kind, settings = item.get_io_type(), item.as_dict()
    if kind == "COMBO":
        return next(o for o in settings["options"] if o != value)
    if kind == "BOOLEAN":
        return not value
    if kind == "STRING":
        return OTHER_TEXT.get(item.id, "another text")
    # denoise works in whole steps of the schedule: one tick of the widget may change nothing
    step = 0.25 if item.id == "denoise" else settings.get("step") or 1
    return value + step if value + step <= settings["max"] else value - step


@pytest.fixture
def observe(run, recording, node_classes, tmp_path):
    """observe(node_id, **changes) -> what reached the host and what came out, from a fresh start."""
    import shutil

    from ernie_pack.nodes.text import _enhanced

    def look(node_id: str, **changes):
        shutil.rmtree(tmp_path / "output")
        (tmp_path / "output").mkdir()
        official = tmp_path / "diffusion_models" / "official"
        official.mkdir(parents=True, exist_ok=True)
        (official / "model_index.json").touch()
        recording.calls.clear()
        _enhanced.clear()
        widgets = {
            item.id: default(item)
            for item in node_classes[node_id].GET_SCHEMA().inputs
            if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
        }
        sockets = dict(SOCKETS.get(node_id, {}))
        if node_id == "ErnieEnhancePrompt":
            sockets["enhancer"] = recording.make_enhancer("component")
        if node_id == "ErnieSampler":
            sockets["latent_image"] = recording.empty_latent(32, 32, 1)
        recording.calls.clear()
        result = run(node_id, **(sockets | widgets | changes)).result
        return [str(call) for call in recording.calls], [str(value) for value in result]

    return look


@pytest.mark.parametrize(("node_id", "widget"), WIDGETS, ids=lambda v: v)
def test_every_widget_matters(observe, node_classes, node_id, widget):
    context = CONTEXT.get((node_id, widget), {})
    item = next(i for i in node_classes[node_id].GET_SCHEMA().inputs if i.id == widget)
    value = context.get(widget, default(item))
    assert observe(node_id, **context) != observe(node_id, **context, **{widget: another(item, value)})


def test_no_widget_is_left_out_above(node_classes, recording):
    # `folder` and `download` of the all-in-one loader have tests of their own in test_loading.py
    elsewhere = {("ErnieLoadImageModel", "folder"), ("ErnieLoadImageModel", "download")}
    everything = {
        (node_id, item.id)
        for node_id, cls in node_classes.items()
        for item in cls.GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    assert everything == set(WIDGETS) | elsewhere
