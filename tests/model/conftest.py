"""One thread: these models are small, and two OpenMP threads on a busy two-core machine wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
