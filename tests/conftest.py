"""Settings of the whole suite: one thread, a seed per test, no deadlines."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the tensors here are small, and threads only wait for each other

hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    yield
    torch.set_default_dtype(previous)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
