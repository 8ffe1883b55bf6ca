"""When a run must go back: steps without a finite gradient in a row, and spikes of the loss."""

import random
from statistics import fmean, stdev

from bigmix.runs.resume import RollBack
from bigmix.train.step_metrics import Health


def health(skips=3, deviations=None, spikes_roll_back=False):
    return Health(skips=skips, deviations=deviations, spikes_roll_back=spikes_roll_back)


def test_only_skips_in_a_row_ask_for_a_roll_back():
    one, asked = health(), []
    for step in range(1, 11):
        one.observe(step, skipped=step not in (3, 7))
        asked.append(one.take_rollback())
    assert [back and back.steps for back in asked] == [
        None,
        None,
        None,
        None,
        None,
        (4, 5, 6),
        None,
        None,
        None,
        (8, 9, 10),
    ]
    assert "3 steps in a row had no finite gradient" in asked[5].reason


def test_no_limit_never_asks():
    one = health(skips=None)
    for step in range(50):
        one.observe(step, skipped=True)
    assert one.take_rollback() is None and not one.is_well
    one.observe(50, skipped=False)
    assert one.is_well


def test_a_spike_is_told_by_a_plain_count_of_deviations():
    draw = random.Random(1)
    losses = [3 + 0.1 * draw.gauss(0, 1) for _ in range(300)]
    losses[150], losses[200] = 5.0, 4.0
    one, window, told = health(deviations=6, spikes_roll_back=True), [], []
    for step, loss in enumerate(losses):
        spike = one.loss(step, loss)
        high = len(window) >= 20 and (loss - fmean(window[-100:])) / stdev(window[-100:]) > 6
        assert (spike is not None) == high
        if spike is None:
            window.append(loss)
        else:
            told.append(spike)
    assert [spike.step for spike in told] == [150, 200]
    assert one.take_rollback() == RollBack(steps=(150, 200), reason="the loss leapt up")
    assert one.take_rollback() is None


def test_a_resumed_run_tells_the_same_spikes():
    draw = random.Random(2)
    losses = [1 + draw.random() ** 8 for _ in range(400)]
    whole, first, second = health(deviations=3), health(deviations=3), health(deviations=3)
    told = [whole.loss(step, loss) for step, loss in enumerate(losses)]
    for step, loss in enumerate(losses[:250]):
        first.loss(step, loss)
    second.resume(first.state())
    assert [second.loss(250 + i, loss) for i, loss in enumerate(losses[250:])] == told[250:]
    assert any(told)


def test_losses_that_do_not_vary_and_those_that_are_not_finite():
    one = health(deviations=6)
    assert all(one.loss(step, 2.0) is None for step in range(30))
    assert one.loss(30, float("nan")) is None
    assert one.loss(31, 2.0) is None
    assert one.loss(32, 2.1).deviations == float("inf")
