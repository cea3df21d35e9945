"""The dtype that a device computes in, over devices that need not be here."""

import numpy as np
import pytest

from cupyllama.errors import DeviceError
from cupyllama.ops import reference
from cupyllama.parallel.devices import (
    Device,
    choose_device,
    choose_dtype,
    gpu_dtype,
    gpu_of_rank,
    storage_dtype,
)

CPU = Device("cpu", "a processor", reference)
TURING = Device("cuda", "Tesla T4", reference, 75)
AMPERE = Device("cuda", "A100", reference, 80)


@pytest.mark.parametrize(
    ("device", "saved", "expected"),
    [
        (CPU, "float32", "float32"),
        (CPU, "float16", "float32"),
        (CPU, "bfloat16", "float32"),
        (TURING, "float32", "float16"),
        (TURING, "float16", "float16"),
        (TURING, "bfloat16", "float16"),  # which it has no instructions for
        (AMPERE, "float32", "float16"),
        (AMPERE, "float16", "float16"),
        (AMPERE, "bfloat16", "bfloat16"),
    ],
)
def test_auto(device, saved, expected):
    assert choose_dtype("auto", saved, device) == expected


@pytest.mark.parametrize("saved", ["float32", "float16", "bfloat16"])
def test_what_is_asked_for_is_taken(saved):
    for device in (CPU, TURING, AMPERE):
        for asked in ("float32", "float16"):
            assert choose_dtype(asked, saved, device) == asked
    for device in (CPU, AMPERE):
        assert choose_dtype("bfloat16", saved, device) == "bfloat16"
    with pytest.raises(DeviceError, match="Tesla T4 has no bfloat16") as error:
        choose_dtype("bfloat16", saved, TURING)
    assert "--dtype float16" in error.value.hint


def test_the_nearest_16_bits():
    names = ("float32", "float16", "bfloat16")
    assert [gpu_dtype(name) for name in names] == ["float16", "float16", "bfloat16"]
    assert [storage_dtype(name).itemsize for name in names] == [4, 2, 2]
    assert storage_dtype("bfloat16").name == "bfloat16" != np.dtype(np.float16).name


def test_the_cpu():
    device, reason = choose_device("cpu")
    assert (device.kind, device.compute_capability, reason) == ("cpu", 0, "")
    assert device.ops is reference and device.name and device.place.endswith("/cpu")


@pytest.mark.parametrize(
    ("local_size", "gpus", "expected"),
    [
        (1, 4, [0]),
        (4, 4, [0, 1, 2, 3]),
        (3, 8, [0, 1, 2]),
        (4, 1, [0, 0, 0, 0]),
        (4, 2, [0, 0, 1, 1]),
        (5, 2, [0, 0, 0, 1, 1]),
    ],
)
def test_ranks_take_gpus_in_order_and_neighbours_share(local_size, gpus, expected):
    assert [gpu_of_rank(rank, local_size, gpus) for rank in range(local_size)] == expected
