import os
import time

import pytest

from common import workers
from common.console import UserError
from common.workers import AHEAD, CHUNK, cores, worker_map


def square(number):
    time.sleep(0.02 * (number % 3 == 0))  # so that results would come out of order
    return number**2


def die(number):
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers):
    with worker_map(workers) as over:
        assert list(over(square, range(30))) == [number**2 for number in range(30)]
        assert list(over(square, [])) == []


def test_the_workers_are_only_so_far_ahead_of_the_reader():
    class Items(list):
        asked = 0

        def __getitem__(self, part):
            self.asked = max(self.asked, part.stop)
            return super().__getitem__(part)

    items = Items(range(1000))
    with worker_map(2) as over:
        assert next(over(square, items)) == 0
    assert 0 < items.asked <= (AHEAD * 2 + 1) * CHUNK


def test_a_worker_that_dies_is_an_error_of_one_line():
    with pytest.raises(UserError, match="--workers 1"), worker_map(2) as over:
        list(over(die, range(4)))


def who(_):
    time.sleep(0.05)  # so that one worker cannot answer for all
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def test_every_worker_has_one_thread_and_this_process_its_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with worker_map(3) as over:
        assert "OMP_NUM_THREADS" not in os.environ
        found = dict(over(who, range(60)))
    assert len(found) == 3 and set(found.values()) == {"1"}


def test_no_more_workers_than_the_system_can_wait_for(monkeypatch):
    """Windows: 61; Python raises ValueError beyond it."""
    monkeypatch.setattr(workers, "MOST_WORKERS", 2)
    with worker_map(5) as over:
        assert len({pid for pid, _ in over(who, range(60))}) <= 2


def test_there_are_as_many_cores_as_this_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert cores() == 16
    for text, expected in (("max 100000", 16), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 16)):
        (tmp_path / "cpu.max").write_text(f"{text}\n")
        assert cores() == expected
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, expected in ((-1, 16), (200000, 2)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
