"""Samples are written in the order of their numbers, whatever the order in which they end."""

import random

import pytest

from bigmix.commands.remedies.sample_files import SampleOrder, complete_lines, keep_lines


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_rows", [1, 4, 32])
def test_samples_are_begun_until_there_are_enough_and_come_in_order(seed, num_rows):
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, 5, 40]) for _ in range(2000)]
    first, needed = 7, 1400
    reported = []
    order = SampleOrder(first, needed, lambda *counts: reported.append(counts))
    rows, found, total = [], [], 0
    while total < needed:
        while len(rows) < num_rows and (number := order.begin()) is not None:
            rows.append(number)
        assert rows, "there are not enough, and none is begun"
        ended = rows.pop(draw.randrange(len(rows)))
        for number in order.end(ended, ended, sizes[ended]):
            found.append(number)
            total += sizes[number]
            if draw.random() < 0.1:  # it is not kept after all
                order.leave_out(sizes[number])
                total -= sizes[number]
    assert found == list(range(first, first + len(found)))
    # What has ended and waits for an earlier one counts as well.
    assert len(reported) >= len(found) and reported[-1][1] >= needed - 40 * num_rows
    # What is begun in vain is in the rows at the end, and no more is begun once there is enough.
    assert len(rows) <= num_rows
    assert order.begin() is None


def test_an_incomplete_line_is_removed_and_lines_can_be_kept(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": "\u2028"}\n{"a": 3')
    assert complete_lines(path) == [{"a": 1}, {"a": "\u2028"}]
    assert path.read_text() == '{"a": 1}\n{"a": "\u2028"}\n'
    keep_lines(path, 1)
    assert path.read_text() == '{"a": 1}\n'
    keep_lines(tmp_path / "absent", 0)
    assert complete_lines(tmp_path / "absent") == []
