"""Recipes: what may be written in a job.toml, what is refused, and what the defaults are."""

import dataclasses
import json

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.recipe import ModelPaths, Recipe, read_recipe, recipe_from_dict

MODELS = {"transformer": "/models/ernie"}
MINIMAL = {"name": "cat", "models": MODELS}


def test_the_defaults_are_the_recommended_recipe():
    r = recipe_from_dict(MINIMAL)
    assert (r.adapter.algorithm, r.adapter.rank, r.adapter.alpha) == ("lora", 32, None)
    o = r.optimiser
    assert (o.name, o.lr, o.weight_decay, o.warmup, o.schedule, o.floor, o.clip) == (
        "adamw",
        1e-4,
        0.01,
        50,
        "cosine",
        0.1,
        1,
    )
    assert (r.batch_size, r.accumulation, r.precision, r.checkpointing) == (1, 2, "bf16", True)
    assert (r.sigmas.kind, r.sigmas.shift, r.sigmas.strata) == ("logit_normal", None, 16)
    assert (r.dpo.beta, r.dpo.anchor_win, r.dpo.anchor_lose) == (0.05, 0.35, 0.15)
    assert r.effective_lr == 1e-4


def test_every_model_falls_back_to_the_official_folder():
    paths = ModelPaths(transformer="/a", vae="/b")
    assert [str(paths.path(k)) for k in ("transformer", "text_encoder", "vae")] == ["/a", "/a", "/b"]


def test_json_and_back_is_the_same_recipe(tmp_path):
    recipe = recipe_from_dict(
        {
            **MINIMAL,
            "stages": [{"resolutions": [256], "until_step": 10}, {"resolutions": [512]}],
            "optimiser": {"lr": 1},
        }
    )
    assert recipe.optimiser.lr == 1.0
    assert isinstance(recipe.optimiser.lr, float)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert read_recipe(path) == recipe


def test_toml(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('\ufeffname = "cat"\n[models]\ntransformer = "/m"\n[adapter]\nrank = 8\n', encoding="utf-8")
    assert read_recipe(path).adapter.rank == 8
    path.write_text("name = cat")
    with pytest.raises(ErnieError, match="not valid TOML"):
        read_recipe(path)
    with pytest.raises(ErnieError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepps": 3}, "stepps is not a setting of a recipe: did you mean 'steps'"),
        ({"optimiser": {"learning": 3}}, r"optimiser.learning is not a setting"),
        ({"steps": "many"}, "steps must be of type int, got 'many'"),
        ({"steps": True}, "steps must be of type int"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"optimiser": {"lr": 0}}, r"optimiser.lr must be above 0"),
        ({"optimiser": {"name": "sgd"}}, r"optimiser.name must be one of adamw"),
        ({"optimiser": {"betas": [0.9]}}, r"optimiser.betas must have 2 entries, got 1"),
        ({"optimiser": 3}, "optimiser must be a table of settings, got 3"),
        ({"objective": "rl"}, "objective must be one of sft, dpo, distil; got 'rl'"),
        ({"name": "a/b"}, "name must be usable as a file name"),
        ({"models": {}}, "models is not complete"),
        ({"objective": "dpo", "region_weight": 0.1}, "belong to the objective sft"),
        ({"reference_bank": 3}, "belong to the objective dpo"),
        ({"depth": {"share": 2}}, r"depth.share must lie between 0 and 1"),
        ({"region_weight": -1}, "region_weight must be 0"),
        ({"stages": 256}, "stages must be a list"),
        ({"stream": True, "checkpointing": False}, "stream needs checkpointing"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ErnieError, match=message):
        recipe_from_dict({**MINIMAL, **values})


def test_the_hash_is_that_of_what_is_computed():
    recipe = recipe_from_dict(MINIMAL)
    free = {"steps": 9, "comment": "x", "tensorboard": True, "keep": 1, "save_every": 3, "save_dtype": "fp32"}
    assert dataclasses.replace(recipe, **free).hash() == recipe.hash()
    changed = {"seed": 1, "batch_size": 2, "precision": "fp32", "region_weight": 0.1}
    hashes = {dataclasses.replace(recipe, **{k: v}).hash() for k, v in changed.items()}
    assert len(hashes | {recipe.hash()}) == 5


def test_every_field_of_a_recipe_can_be_read_back():
    recipe = Recipe(name="a", models=ModelPaths(transformer="/a"))
    assert recipe_from_dict(recipe.to_dict()) == recipe
