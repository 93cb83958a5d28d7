"""A trained model and its tiles, for the tests of fields/."""

import pytest

from evaluation.candidates import candidate_of_run
from evaluation.test_set import open_test_set


@pytest.fixture
def candidate(trained):
    return candidate_of_run(trained, "best", [], flips=False, precision="float32")


@pytest.fixture
def tiles(candidate):
    """All twelve tiles."""
    return open_test_set([candidate], "all")
