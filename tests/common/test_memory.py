"""common/memory.py: freed memory is kept. tests/test_train.py tests what is said when there is too little."""

import platform
import subprocess
import sys

import pytest
from helpers import REPOSITORY

FAULTS = """
import resource, sys
import numpy as np
from common.memory import reuse_memory

if sys.argv[1] == "keep":
    reuse_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(int(float(sys.argv[2]) * 2**27))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept only if the C library is glibc")
@pytest.mark.parametrize("gib", [0.01, 0.1, 2.2])
def test_memory_that_is_kept_costs_no_page_faults(gib):
    def faults(how):
        out = subprocess.run([sys.executable, "-c", FAULTS, how, str(gib)], cwd=REPOSITORY, capture_output=True,
                             text=True, check=True)
        return int(out.stdout)

    assert faults("keep") < 5 < 20 < faults("return")
