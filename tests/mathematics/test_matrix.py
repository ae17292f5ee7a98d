"""The definitions, pinned by a worked matrix; the variant that divides by T must differ."""

import pytest

from learners.matrix import transfer

SCORES = [[0.98, 0.10, 0.20], [0.90, 0.57, 0.25], [0.80, 0.50, 0.72]]
BASE = [0.05, 0.20, 0.10]


def test_a_worked_matrix():
    found = transfer(SCORES, BASE)
    assert found.average == pytest.approx(0.67333, abs=1e-5)
    assert found.backward == pytest.approx(-0.125)
    assert found.forward == pytest.approx(0.025)
    assert found.forgetting == pytest.approx(0.125)


def test_dividing_by_all_tasks_is_another_number():
    wrong = sum(SCORES[-1][j] - SCORES[j][j] for j in range(3)) / 3
    assert wrong == pytest.approx(-0.08333, abs=1e-5)
    assert transfer(SCORES, BASE).backward != pytest.approx(wrong, abs=1e-3)


def test_one_task_forgets_nothing():
    assert transfer([[0.7]], [0.1]).forgetting == 0


def test_a_ragged_matrix_is_refused():
    with pytest.raises(ValueError, match="square"):
        transfer([[1.0, 2.0], [1.0]], [0.0, 0.0])
