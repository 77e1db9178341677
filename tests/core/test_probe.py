"""The cost that is promised before a run is measured on real steps."""

import pytest
from ernie_pack.ernie_core.errors import ErnieError
from ernie_pack.ernie_core.training.probe import STEPS, probe
from ernie_pack.ernie_core.training.trainer import Trainer
from random_models import write_random_models
from training_jobs import model_paths, small_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_random_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_three_steps_are_measured(objective, models):
    cost = probe(small_recipe(models, objective=objective), (64, 48), text_tokens=9, device="cpu")
    assert len(cost.seconds) == STEPS == 3
    assert all(0 < s < 30 for s in cost.seconds)
    assert cost.size == (64, 48)
    assert cost.peak_bytes is None


def test_steps_are_measured_at_the_size_that_was_asked_for(models, monkeypatch):
    seen = []
    step = Trainer.train_step

    def watched(self, number):
        seen.append([tuple(batch.latents_BCHW.shape) for batch in self.feed.micro_batches(number)])
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", watched)
    recipe = small_recipe(models)
    probe(recipe, (128, 80), device="cpu")
    assert seen == [[(recipe.batch_size, 128, 5, 8)] * recipe.accumulation] * (1 + STEPS)


def test_models_that_are_not_there_are_named(models, tmp_path):
    from dataclasses import replace

    paths = replace(model_paths(models), transformer=str(tmp_path / "gone.safetensors"))
    with pytest.raises(ErnieError, match=r"gone\.safetensors"):
        probe(replace(small_recipe(models), models=paths), (64, 64), device="cpu")
