"""Loading a stage while the main thread reads and tokenises."""

import threading
import time

from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.source import Checkpoint
from cupyllama.config import ModelConfig
from cupyllama.errors import DeviceError
from cupyllama.families import StageWeights
from cupyllama.loading import load_stage
from cupyllama.parallel.devices import Device, storage_dtype


class _Cancelled(Exception):
    """Ends the loading threads."""


class BackgroundLoad:
    """The weights of some layers, on their way from the moment this is made."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        layers: range,
        dtype: str,
        device: Device,
        show_progress: bool,
        quantize: str | None = None,
    ):
        """`quantize`: as `load_stage` takes it."""
        self._arguments = (checkpoint, config, layers, storage_dtype(dtype), device.ops)
        self._device, self._dtype = device, dtype
        self._quantize = quantize
        self._need = stage_bytes(config, layers, storage_dtype(dtype), quantize)
        self._free = device.free_bytes()
        self._show_progress = show_progress
        self._cancelled = False
        self._error: BaseException | None = None
        self._weights: StageWeights | None = None
        if self._free is not None and self._need > self._free:
            raise self._too_large()
        self.began = self.ended = time.time()
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def free_for_activations(self, sharing: int) -> int | None:
        """Device memory that loading leaves, where `sharing` ranks have the device together."""
        return None if self._free is None else self._free // sharing - self._need

    def wait(self) -> StageWeights:
        """The weights, once they are there.

        Raises:
            ModelError: a tensor is missing, misshapen, cut short.
            DeviceError: the weights do not fit.
        """
        self._thread.join()
        if isinstance(self._error, MemoryError):
            raise self._too_large() from self._error
        if self._error is not None:
            raise self._error
        return self._weights

    def cancel(self) -> None:
        """End the threads; harmless when they have ended."""
        self._cancelled = True
        self._thread.join()

    def _run(self) -> None:
        from tqdm import tqdm

        self._device.use()  # CUDA's current device is each thread's own
        bar = tqdm(
            total=self._need,
            unit="B",
            unit_scale=True,
            desc="loading",
            disable=None if self._show_progress else True,
            leave=False,
        )

        def on_bytes(count: int) -> None:
            if self._cancelled:
                raise _Cancelled
            bar.update(count)

        try:
            self._weights = load_stage(*self._arguments, on_bytes, quantize=self._quantize)
        except BaseException as error:  # raised again by the thread that waits
            self._error = error
        self.ended = time.time()
        bar.close()

    def _too_large(self) -> DeviceError:
        quantized = "" if self._quantize is None else f" and {self._quantize}"
        return DeviceError(
            f"the weights take {self._need / 1e9:.1f} GB in {self._dtype}{quantized}, and "
            f"{self._device.name} has {(self._free or 0) / 1e9:.1f} GB free",
            "Free some memory, give a smaller --dtype or --quantize int8, or share the layers "
            "among several devices.",
        )
