"""Scorers layer by layer: the same scores with two layers on the device, and weights that come home."""

import numpy as np
import pytest
import tiny_scorers as tiny
import torch
from ernie_pack.ernie_core.scoring.ernie_aes import load_ernie_aes
from ernie_pack.ernie_core.scoring.network import LowBitLinear, bring_loose, read_weights
from ernie_pack.ernie_core.scoring.streaming import stacked_layers, stream_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "aes"
    tiny.write_internvl(path)
    return path


def pictures(count=3):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_streamed_scores_are_resident_scores_to_the_bit(folder, precision):
    expected = load_ernie_aes(read_weights(folder), precision=precision).score(pictures(), batch_size=2)
    scorer = load_ernie_aes(read_weights(folder), precision=precision)
    layers = stacked_layers(scorer.network)
    assert len(layers) == 4  # two of the vision model, two of the language model
    stream = stream_layers(scorer.network, "cpu")
    for _ in range(2):
        assert scorer.score(pictures(), batch_size=2) == expected
    sizes = [sum(-(-t.nbytes // 256) * 256 for t in (*x.parameters(), *x.buffers())) for x in layers]
    assert stream.resident_bytes == 2 * max(sizes)  # of 28 large and 24 small layers, two large ones


def test_layers_use_the_copies_and_come_home(folder):
    scorer = load_ernie_aes(read_weights(folder), precision="nf4")
    stream = stream_layers(scorer.network, "cpu")
    layer = stacked_layers(scorer.network)[2]
    linear = next(m for m in layer.modules() if isinstance(m, LowBitLinear))
    home = linear.weight.data_ptr()
    seen = []
    linear.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data_ptr()))
    scorer.score(pictures())
    slots = [(slot.data_ptr(), slot.data_ptr() + slot.numel()) for slot in stream._slots]
    assert seen
    assert all(any(low <= pointer < high for low, high in slots) for pointer in seen)
    assert linear.weight.data_ptr() == home


def test_an_error_inside_a_layer_leaves_the_weights_at_home(folder):
    scorer = load_ernie_aes(read_weights(folder))
    stream_layers(scorer.network, "cpu")
    layer = stacked_layers(scorer.network)[3]
    homes = [p.data_ptr() for p in layer.parameters()]

    def fail(*_):
        raise KeyboardInterrupt

    hook = next(layer.children()).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(pictures())
    assert [p.data_ptr() for p in layer.parameters()] == homes
    hook.remove()
    assert scorer.score(pictures()) == load_ernie_aes(read_weights(folder)).score(pictures())


def test_what_is_loose_is_brought_and_layers_are_left(folder):
    """The meta device stands for a card: what must go there went, what brings itself stayed."""
    network = load_ernie_aes(read_weights(folder), precision="nf4").network

    def brings_itself(module):
        return isinstance(module, (*LowBitLinear, torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d))

    bring_loose(network, torch.device("meta"), brings_itself)
    for module in network.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert {t.is_meta for t in own} <= {not brings_itself(module)}
    assert network.model.vision_tower.embeddings.cls_token.is_meta
    assert network.model.vision_tower.encoder.layer[0].lambda_1.is_meta
