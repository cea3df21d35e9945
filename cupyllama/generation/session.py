"""A model that is ready to generate: what one rank, or each of several, has of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cupyllama.errors import DeviceError
from cupyllama.families import family_of
from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from cupyllama.generation.engine import PREFILL_TOKENS, Engine
from cupyllama.parallel.devices import Device, storage_dtype
from cupyllama.parallel.links import connect_links
from cupyllama.parallel.pipeline import connect_group
from cupyllama.parallel.world import World, open_world
from cupyllama.provenance import digests
from cupyllama.rank import Rank, check_same
from cupyllama.sizing import activation_bytes
from cupyllama.tokenizer import check_vocabulary, load_tokenizer

# Of the memory that is left, what the cache may take: the pool has holes.
_CACHE_SHARE = 0.9
# Times that the logits of a pass are there: a rank's own, those of all ranks, what sampling makes
# of them, and those of the steps that were captured.
_LOGITS = 4


@dataclass(frozen=True)
class SessionOptions:
    """Which model, and how it is computed."""

    model: Path
    tokenizer: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    tensor_parallel: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    quiet: bool = False


@contextmanager
def open_session(options: SessionOptions, remedy: str = "") -> Iterator["Session"]:
    """A session, together with the other ranks if a launcher started several.

    Between `engine` and the end, work in `session.world.alone()`: others wait for this rank.

    Args:
        remedy: as `open_world` takes it.

    Raises:
        CupyllamaError: whatever the user can mend, each with its exit code.
    """
    world = open_world(remedy)
    session = Session(options, world)
    try:
        with world.together():
            session.set_up()
        yield session
    finally:
        session.close()
    world.close()


class Session(Rank):
    """One rank's part, from the options to an engine.

    After `set_up`: `config`, `tokenizer`, `device`, `dtype`, `quantize`, and weights on their way.
    """

    def __init__(self, options: SessionOptions, world: World):
        super().__init__(options, world)
        self._decoders: list[Any] = []

    def set_up(self) -> None:
        """Who does what on which device; begins to load. In `world.together()`."""
        self.choose_part()
        self.tokenizer = load_tokenizer(self.options.model, self.options.tokenizer)
        check_vocabulary(self.tokenizer, self.config.vocab_size, self.options.model)
        self.begin_load()

    def engine(self, rows: int, max_keys: int) -> Engine:
        """What generates, once the weights are there. All ranks call it, each with the same.

        The cache is as large as `rows` sequences of `max_keys` can make use of, or as the memory
        that is free: then some of them wait.

        Args:
            rows: sequences at a time, at most.
            max_keys: of a sequence, prompt and answer: `Prompt.keys`; up to `config.max_length`.

        Raises:
            ModelError, DeviceError: the weights are broken, or they or one sequence do not fit.
            DataError: ranks have different files.
        """
        assert 0 < max_keys <= self.config.max_length, f"{max_keys}"
        world = self.world
        with world.together():
            weights = self.load.wait()
        work = digests(self.checkpoint, self.config, self.tokenizer.path, data="") | {
            "dtype": self.dtype,
            "quantize": self.quantize,
            "kind of device": self.device.kind,
            "sequences": (rows, max_keys),
        }
        everyone = world.allgather((work, self.device.place))
        with world.together():
            check_same([other for other, _ in everyone])
        places = [place for _, place in everyone]
        blocks = self._cache_blocks(rows, max_keys, places.count(self.device.place))
        blocks = min(world.allgather(blocks))
        with world.alone():
            ops = decode_ops(self.device)
            group = connect_group(world, self.grid, self.device, self.own_config, ops)
            links = connect_links(world, self.grid, self.device)
            stage = family_of(self.config).model.Stage(
                self.own_config, weights, ops, max_keys, group
            )
            try:
                with self.device.ops.memory_errors():
                    cache = make_cache(stage, self.device, blocks, storage_dtype(self.dtype))
                    decoder = ops.Decoder(
                        stage, cache, rows, max_keys, self.config.vocab_size, links
                    )
            except MemoryError as error:
                raise self._too_small(max_keys) from error
        self._decoders.append(decoder)
        return Engine(decoder, BlockPool(blocks), rows, max_keys)

    def close(self) -> None:
        """End what is open; no engine of this session is used any more."""
        for decoder in self._decoders:
            decoder.close()
        super().close()

    def _cache_blocks(self, rows: int, max_keys: int, sharing: int) -> int:
        """Blocks that this rank has memory for, of those that can be used."""
        wanted = rows * blocks_for(max_keys) + 1
        free = self.device.free_bytes()
        with self.world.together():
            if free is None:
                return wanted
            tokens = PREFILL_TOKENS + max_keys
            config, dtype = self.own_config, self.dtype
            used = activation_bytes(config, tokens, dtype, 0, self.quantize, fused=False)
            used += _LOGITS * 4 * rows * config.vocab_size
            itemsize = storage_dtype(dtype).itemsize
            block = BLOCK_TOKENS * 2 * config.kv_size * itemsize * len(self.layers)
            fitting = int(_CACHE_SHARE * (free // sharing - used)) // block
            if fitting <= blocks_for(max_keys):
                raise self._too_small(max_keys)
            return min(wanted, fitting)

    def _too_small(self, max_keys: int) -> DeviceError:
        return DeviceError(
            f"beside the weights, {self.device.name} has no memory for the keys and values of "
            f"{max_keys:,} tokens",
            "Give fewer --max-new-tokens, --prompt in place of a session, a smaller --dtype or "
            "--quantize int8, or share the layers among several devices.",
        )


def decode_ops(device: Device) -> ModuleType:
    """The operations of generation on a device, with the Decoder that goes with them."""
    if device.kind == "cpu":
        from cupyllama.ops import decode_reference

        return decode_reference
    from cupyllama.ops import decode_cuda

    return decode_cuda


def make_cache(stage: Any, device: Device, blocks: int, dtype: Any) -> list[Any]:
    """The cache of a stage: of each layer (slots, 2 · kv)."""
    shape = blocks * BLOCK_TOKENS, 2 * stage.config.kv_size
    cache = [device.ops.empty(shape, dtype) for _ in stage.weights.layers]
    if device.kind == "cuda":
        for layer in cache:
            layer.fill(0)  # kernels multiply by 0 what a query does not see: it must be finite
    return cache
