"""The simulation behind the tournament's table, in miniature."""

import numpy as np
import pytest
from ernie_pack.bench.tournament import simulate


@pytest.mark.parametrize("noise", [0.0, None])
def test_every_way_of_pairing_is_measured_on_the_same_strengths(noise):
    found, again = (simulate(16, 6, noise, repeats=3) for _ in range(2))
    assert found == again
    for name, values in vars(found).items():
        assert len(values) == 3
        assert 0 < np.mean(values) <= 1, name


def test_without_errors_enough_rounds_know_nearly_everything():
    assert np.mean(simulate(16, 8, 0.0, repeats=5).swiss) > 0.97
