"""What all tests of planning share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These tensors are small: on a shared machine a second thread waits more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
