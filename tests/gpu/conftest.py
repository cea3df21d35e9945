"""Skip the tests of this folder where no GPU is usable; what those of kernels start from."""

import time
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng():
    seed = time.time_ns() % 2**32
    print(f"{seed=}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


@pytest.fixture
def poison():
    """What the memory pool hands out next holds NaN wherever nobody writes."""
    import cupy

    block = cupy.full(1 << 28, 0xFF, cupy.uint8)
    del block
    yield
    cupy.cuda.get_current_stream().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()


def _gpu_problem() -> str | None:
    try:
        import cupy

        cupy.zeros(1).get()
    except Exception as error:
        return f"no usable GPU: {error}"
    return None


def pytest_collection_modifyitems(items):
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    problem = _gpu_problem() if here else None
    if problem:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=problem))
