import os
import time

import pytest
from conftest import REPOSITORY, script

from console import UserError
from parallel import AHEAD, CHUNK, cores, spread


def square(number):
    time.sleep(0.02 * (number % 3 == 0))  # so that results would come out of order
    return number**2


def die(number):
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers):
    with spread(workers) as over:
        assert list(over(square, range(30))) == [number**2 for number in range(30)]
        assert list(over(square, [])) == []


def test_the_workers_are_only_so_far_ahead_of_the_reader():
    class Items(list):
        asked = 0

        def __getitem__(self, part):
            self.asked = max(self.asked, part.stop)
            return super().__getitem__(part)

    items = Items(range(1000))
    with spread(2) as over:
        assert next(over(square, items)) == 0
    assert 0 < items.asked <= (AHEAD * 2 + 1) * CHUNK


def test_a_worker_that_dies_is_an_error_of_one_line():
    with pytest.raises(UserError, match="--workers 1"), spread(2) as over:
        list(over(die, range(4)))


def who(_):
    time.sleep(0.05)  # so that one worker cannot answer for all
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def test_every_worker_has_one_thread_and_this_process_its_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with spread(3) as over:
        assert "OMP_NUM_THREADS" not in os.environ
        found = dict(over(who, range(60)))
    assert len(found) == 3 and set(found.values()) == {"1"}


def test_there_is_a_core():
    assert 1 <= cores() <= os.cpu_count()


def test_the_filter_starts_without_torch(tmp_path):
    """Its import takes seconds, in every worker process."""
    (tmp_path / "probe.py").write_text("import sys, data_filter\nsys.exit('torch' in sys.modules)\n")
    out = script(tmp_path / "probe.py", cwd=REPOSITORY)
    assert out.returncode == 0, out.stderr
