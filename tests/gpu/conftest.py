"""Skip the tests of this folder where no GPU is usable."""

from pathlib import Path

import pytest


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
