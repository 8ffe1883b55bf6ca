"""The learning rate warms up, keeps its shape and comes down to where it should."""

from itertools import pairwise

import pytest

from bigmix.recipe.schedule import LearningRate, warmup_steps


def rates(shape, steps=100, warmup=10, decay=0.2, final=0.0):
    rate = LearningRate(
        peak=1.0, steps=steps, warmup_steps=warmup, shape=shape, decay=decay, final=final
    )
    return [rate.at(step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_every_shape_warms_up_linearly_to_its_peak(shape):
    found = rates(shape)
    assert found[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(found) == 1.0
    assert all(later <= earlier for earlier, later in pairwise(found[9:]))
    assert min(found) > 0


def test_the_shapes_differ_where_they_should():
    assert rates("constant")[9:] == [1.0] * 91
    assert rates("wsd")[:80][9:] == [1.0] * 71
    assert rates("wsd")[89] == pytest.approx(1 - 10 / 21)
    assert rates("linear")[54] == pytest.approx(1 - 45 / 91)
    assert rates("cosine", warmup=0, steps=99)[49] == pytest.approx(0.5)
    assert rates("linear", final=0.1)[-1] == pytest.approx(0.1 + 0.9 / 91)


def test_one_step_and_a_run_of_warm_up_alone_work():
    assert rates("cosine", steps=1, warmup=0) == [pytest.approx(0.5)]
    assert rates("cosine", steps=5, warmup=5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_warm_up_is_a_fraction_or_a_number_of_steps():
    assert warmup_steps(0.03, 1000) == 30 and warmup_steps(50, 1000) == 50
