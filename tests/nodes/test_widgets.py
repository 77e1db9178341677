"""Every widget matters: moving it off its default changes what reaches the host or comes out of the node."""

import pytest
import torch
from ernie_pack.ernie_core.errors import ErnieError
from small_data import write_pairs, write_pictures

# Sockets, and the settings under which a widget is read.
SOCKETS = {
    "ErnieEncodePrompt": {"clip": "CLIP"},
    "ErnieSampler": {"model": "MODEL", "positive": [["p", {}]], "negative": [["n", {}]]},
    "ErnieBatchFromPrompts": {"model": "MODEL", "clip": "CLIP", "vae": "VAE"},
    "ErnieDatasetImages": {"images": torch.linspace(0, 1, 2 * 32 * 32 * 3).reshape(2, 32, 32, 3)},
    "ErnieCompareImages": {"image_a": torch.zeros(1, 16, 16, 3), "image_b": torch.ones(2, 16, 16, 3)},
    "ErnieReducedDepth": {"model": "MODEL"},
    "ErnieStepCache": {"model": "MODEL"},
    "ErnieGuidance": {"model": "MODEL"},
    "ErnieSkipLayerGuidance": {"model": "MODEL"},
    "ErnieNegativeForTurbo": {"model": "MODEL", "negative": [["n", {}]]},
    "ErnieSeedVariety": {"model": "MODEL"},
    "ErnieStyleStatistics": {"model": "MODEL", "latent": {"samples": torch.ones(1, 128, 2, 2)}},
}
CONTEXT = {
    ("ErnieEmptyLatent", "width"): {"size": "custom"},
    ("ErnieEmptyLatent", "height"): {"size": "custom"},
    ("ErnieSampler", "steps"): {"preset": "custom"},
    ("ErnieSampler", "cfg"): {"preset": "custom"},
    ("ErnieBatchFromPrompts", "steps"): {"preset": "custom"},
    ("ErnieBatchFromPrompts", "cfg"): {"preset": "custom"},
    ("ErnieBatchFromPrompts", "wildcards"): {"source": "a {red|blue} fox"},
    **{("ErnieWildcards", w): {"text": "a {a|b|c|d} {a|b|c|d} fox"} for w in ("seed", "row")},
    ("ErnieWildcards", "folder"): {"text": "__missing__"},
    **{("ErnieGuidance", w): {"method": "apg"} for w in ("eta", "momentum", "norm_threshold")},
    **{("ErnieLayoutPrompt", w): {"subject": "a cat"} for w in ("layout", "language", "style")},
    **{("ErnieLayoutPrompt", w): {"subject": "a cat", "layout": "comic"} for w in ("columns", "rows")},
    ("ErnieGuidance", "zero_steps"): {"method": "cfg-zero*"},
    ("ErnieEnhancePrompt", "preset"): {"temperature": 0.9},
    ("ErnieEnhancePrompt", "words"): {"length": "words"},
    **{("ErnieEnhancePrompt", w): {"prompt": '"LOST"'} for w in ("quoted_text", "retries")},
    ("ErnieDatasetFolder", "default_caption"): {"path": "bare", "missing_caption": "default"},
    ("ErnieDatasetFolder", "missing_caption"): {"path": "bare"},
    ("ErnieDatasetImages", "balance"): {"repeats": 3},
    ("ErniePairsFolder", "min_margin"): {"path": "pairs"},
    ("ErniePairsFolder", "max_per_prompt"): {"path": "pairs"},
    ("ErniePairsFolder", "caption_dropout"): {"path": "pairs"},
    ("ErniePairsFolder", "missing_caption"): {"path": "bare_pairs"},
    ("ErniePairsFolder", "default_caption"): {"path": "bare_pairs", "missing_caption": "default"},
}
DEFAULT_TEXT = {"source": "one\ntwo", "path": "pictures"}
OTHER_TEXT = {
    "source": "one",
    "name": "elsewhere",
    "path": "bare_pairs",
    "styles": "keyword 2",
    "blocks": "3, 5-6",
    "matte": "#102030",
    "mask_folder": "pictures",
    "resolution": "256:10, 512+1024",
    "settings": 'comment = "x"',
}

RECIPE_WIDGETS = (
    *("name", "steps", "learning_rate", "algorithm", "rank", "alpha", "resolution", "batch_size", "accumulation"),
    *("precision", "seed", "save_every", "sample_prompts", "sample_every", "sample_width", "sample_height"),
    *("optimiser", "schedule", "warmup", "ema", "noise_levels", "skip_blocks", "skip_share", "stream"),
    *("initial_lora", "settings", "noise_start", "noise_end"),
)
NOT_DISTILLED = ("noise_levels", "skip_blocks", "skip_share", "noise_start", "noise_end")
DISTIL_WIDGETS = (
    *(w for w in RECIPE_WIDGETS if w not in NOT_DISTILLED),
    *("prompts", "student_steps", "student_shift", "teacher_cfg", "trajectory_steps", "form", "gradient", "rollout"),
    *("fake_updates", "fake_learning_rate", "fake_rank", "fake_warmup", "anchor_weight", "gan_weight", "stop_on_alarm"),
)
WIDGETS = [
    *[("ErnieLoadDiffusionModel", w) for w in ("model_name", "weight_dtype")],
    *[("ErnieLoadTextEncoder", w) for w in ("encoder_name", "rope")],
    ("ErnieLoadPromptEnhancer", "enhancer_name"),
    *[("ErnieLoadVAE", w) for w in ("vae_name", "weight_dtype")],
    ("ErnieEncodePrompt", "prompt"),
    *[("ErnieEnhancePrompt", w) for w in ("prompt", "enabled", "width", "height", "seed", "temperature", "top_p")],
    *[("ErnieEnhancePrompt", w) for w in ("top_k", "min_p", "repetition_penalty", "max_new_tokens")],
    *[
        ("ErnieEnhancePrompt", w)
        for w in ("preset", "language", "length", "words", "quoted_text", "retries", "variants")
    ],
    *[("ErnieEmptyLatent", w) for w in ("size", "width", "height", "batch_size")],
    *[("ErnieSampler", w) for w in ("preset", "steps", "cfg", "shift", "seed", "denoise", "sampler")],
    *[("ErnieSamplerSelect", w) for w in ("sampler", "eta")],
    *[("ErnieSigmas", w) for w in ("steps", "shift", "denoise")],
    *[("ErnieGuidance", w) for w in ("method", "start", "end", "rescale", "skip_similarity", "eta", "momentum")],
    *[("ErnieGuidance", w) for w in ("norm_threshold", "zero_steps")],
    *[("ErnieSkipLayerGuidance", w) for w in ("scale", "blocks", "start", "end")],
    *[("ErnieNegativeForTurbo", w) for w in ("scale", "start", "end", "tau", "alpha")],
    *[("ErnieSeedVariety", w) for w in ("strength", "start", "end", "rescale")],
    *[("ErnieStyleStatistics", w) for w in ("strength", "start", "end")],
    *[("ErnieBatchFromPrompts", w) for w in ("source", "name", "negative", "width", "height", "preset", "steps")],
    *[("ErnieBatchFromPrompts", w) for w in ("cfg", "shift", "seed", "collect", "wildcards")],
    *[("ErnieBatchFromPrompts", w) for w in ("variations", "remake", "made_with", "sampler")],
    *[("ErnieCompareImages", w) for w in ("label_a", "label_b")],
    *[("ErnieWildcards", w) for w in ("text", "seed", "row", "folder")],
    *[("ErnieLayoutPrompt", w) for w in ("layout", "language", "subject", "style", "title", "subtitle", "body")],
    *[("ErnieLayoutPrompt", w) for w in ("columns", "rows")],
    *[("ErnieLoadImageModel", w) for w in ("weight_dtype", "rope", "load_enhancer")],
    *[("ErnieDatasetFolder", w) for w in ("path", "format", "trigger", "caption_dropout", "missing_caption")],
    *[("ErnieDatasetFolder", w) for w in ("default_caption", "repeats", "loss_weight", "shuffle_tags", "keep_tags")],
    *[("ErnieDatasetFolder", w) for w in ("styles", "caption_per_line", "alpha", "matte", "mask_folder")],
    *[("ErnieDatasetFolder", w) for w in ("mask_floor", "max_aspect", "max_upscale", "balance")],
    *[("ErnieDatasetImages", w) for w in ("captions", "name", "trigger", "caption_dropout", "repeats", "balance")],
    *[("ErniePairsFolder", w) for w in ("path", "min_margin", "max_per_prompt", "caption_dropout")],
    *[("ErniePairsFolder", w) for w in ("missing_caption", "default_caption")],
    *[("ErnieTrainingModels", w) for w in ("model_name", "encoder_name", "vae_name", "turbo_name")],
    *[(node, w) for node in ("ErnieRecipe", "ErnieRecipeDPO") for w in RECIPE_WIDGETS],
    *[("ErnieRecipeDistil", w) for w in DISTIL_WIDGETS],
    *[("ErnieRecipe", w) for w in ("region_weight", "keyword_weight")],
    *[("ErnieRecipeDPO", w) for w in ("beta", "anchor_win", "anchor_lose", "reduction", "anchor_reduction")],
    *[("ErnieRecipeDPO", w) for w in ("auto_beta", "sdpo_mu", "reference_lora", "reference_bank")],
    ("ErnieReducedDepth", "blocks"),
    *[("ErnieStepCache", w) for w in ("threshold", "start", "end", "max_skips", "signal")],
]
LORA_WIDGETS = [
    *[("ErnieLoadLora", w) for w in ("lora_name", "strength", "blocks", "start", "end", "allow_unmatched")],
    *[("ErnieMergeLora", f"{w}_{i}") for i in (1, 2, 3) for w in ("lora", "strength", "blocks")],
    *[("ErnieMergeLora", w) for w in ("model_name", "allow_unmatched", "name", "overwrite")],
    *[("ErnieExtractLora", w) for w in ("base_name", "tuned_name", "rank", "energy", "vectors", "dtype")],
    *[("ErnieExtractLora", w) for w in ("name", "overwrite")],
    *[("ErnieResizeLora", w) for w in ("model_name", "lora_name", "rank", "energy", "name", "overwrite")],
    *[("ErnieConvertLora", w) for w in ("model_name", "lora_name", "dialect", "rank", "name", "overwrite")],
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

    def look(node_id: str, **changes):
        shutil.rmtree(tmp_path / "output")
        (tmp_path / "output").mkdir()
        official = tmp_path / "diffusion_models" / "official"
        official.mkdir(parents=True, exist_ok=True)
        (official / "model_index.json").touch()
        if node_id in ("ErnieDatasetFolder", "ErniePairsFolder"):
            write_pictures(tmp_path / "input" / "pictures" / "3_cat", count=2)
            write_pictures(tmp_path / "input" / "bare", count=1, captions=False)
            write_pairs(tmp_path / "input" / "pairs", count=2)
            write_pairs(tmp_path / "input" / "bare_pairs", count=1, captions=False)
        recording.calls.clear()
        shutil.rmtree(tmp_path / "user", ignore_errors=True)
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
        try:
            output = run(node_id, **(sockets | widgets | changes))
        except ErnieError as e:
            return str(e)
        return [str(call) for call in recording.calls], [str(value) for value in output.result or ()], str(output.ui)

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
    # and those of a running job in test_training.py
    elsewhere |= {("ErnieTrain", name) for name in ("action", "wait", "process")} | {("ErnieTrainingReport", "name")}
    elsewhere |= {  # in test_text.py and core/test_enhancing_server.py, with a server
        ("ErnieServerEnhancer", name) for name in ("send_prompts", "url", "model", "key_variable", "timeout", "retries")
    }
    elsewhere |= {("ErnieEnhancePrompt", "cache")}  # in test_text.py, with two runs
    elsewhere |= {("ErnieRecipeDistil", "start_lora")}  # a link, in test_training.py
    elsewhere |= set(LORA_WIDGETS)  # in test_lora.py, with real files
    elsewhere |= {  # all of these in test_inpainting.py, with pictures and a network in miniature
        (node_id, item.id)
        for node_id in ("ErnieInpaintPrepare", "ErnieInpaintStitch", "ErnieHardInpaint")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_tournament.py, with a real store
        (node_id, item.id)
        for node_id in ("ErnieTournament", "ErniePairsFromScores")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_win_rate.py, with painted folders
        (node_id, item.id)
        for node_id in ("ErnieChoosePairs", "ErnieWinRate")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_evaluation.py, with a painted prompt set and a real store
        (node_id, item.id)
        for node_id in ("ErniePromptSet", "ErnieJudgeByPeople", "ErnieJudgeByScorer", "ErnieEvaluationReport")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {("ErnieFolderDistance", w) for w in ("model_name", "first", "second", "batch_size")}  # there too
    elsewhere |= {  # all of these in test_scoring.py, with small scorers
        (node_id, item.id)
        for node_id in ("ErnieLoadScorer", "ErnieScoreImages", "ErnieFilterByScore", "ErnieBestOfN", "ErnieScoreReport")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_experts.py, on a network
        (node_id, item.id)
        for node_id in ("ErnieExpert", "ErnieMixExperts")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "FLOAT")
    }
    elsewhere |= {  # all of these in test_benchmark.py, with rated pictures and files of results
        (node_id, item.id)
        for node_id in ("ErnieAestheticBenchmark", "ErniePromptBenchmark")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_teachers.py, by the table that comes out
        ("ErnieTeacherTable", item.id)
        for item in node_classes["ErnieTeacherTable"].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "STRING", "FLOAT")
    }
    # in test_upscaling.py, by what reaches the host and by the latent that comes out
    elsewhere |= {("ErnieTiledSampling", name) for name in ("tile", "overlap")}
    elsewhere |= {("ErnieUpscaleLatent", name) for name in ("scale", "method")}
    elsewhere |= {("ErnieRegionalPrompt", "strength")}  # in test_regions.py of the engine
    elsewhere |= {  # all of these in test_editing.py, by what reaches the engine
        (node_id, item.id)
        for node_id in ("ErnieEditWords", "ErnieVariation", "ErnieInvertPicture", "ErnieMixNoise")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_grid.py, on networks in miniature
        ("ErnieXYGrid", item.id)
        for item in node_classes["ErnieXYGrid"].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_curation.py, with a pile of files
        (node_id, item.id)
        for node_id in ("ErnieCurateIngest", "ErnieCurateFilter", "ErnieCurationReport", "ErnieCurateExport")
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_labelling.py, by the key of the stage or by what is sent
        (node_id, item.id)
        for node_id in (
            *("ErnieCurateCategories", "ErnieCurateCaptions", "ErnieCurateCaptionStyles", "ErnieCurateScores"),
            *("ErnieLoadCaptioner", "ErnieServerCaptioner"),
        )
        for item in node_classes[node_id].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    elsewhere |= {  # all of these in test_mixing.py, with a manifest
        ("ErnieSamplingPlan", item.id)
        for item in node_classes["ErnieSamplingPlan"].GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    # in test_adviser.py, with model files
    elsewhere |= {("ErnieHardwareAdviser", name) for name in ("width", "height", "text_tokens", "card")}
    everything = {
        (node_id, item.id)
        for node_id, cls in node_classes.items()
        for item in cls.GET_SCHEMA().inputs
        if item.get_io_type() in ("COMBO", "BOOLEAN", "STRING", "INT", "FLOAT")
    }
    assert everything == set(WIDGETS) | elsewhere
