"""The Decoder: replayed steps against launched ones, and both against NumPy's tokens."""

from dataclasses import replace

import numpy as np
import pytest
from engine import build_stage
from tiny_generation import GENERATING, write_generating_model

from cupyllama.errors import NotFiniteError
from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from cupyllama.generation.engine import Engine, Prompt
from cupyllama.generation.settings import NO_TOKEN, SamplingSettings

cupy = pytest.importorskip("cupy")
decode_cuda = pytest.importorskip("cupyllama.ops.decode_cuda")
decode_reference = pytest.importorskip("cupyllama.ops.decode_reference")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

MAX_KEYS = 120
NEW_TOKENS = 40
BLOCKS = 80

every_model = pytest.mark.parametrize("name", sorted(GENERATING))


def decoder_of(model, ops, rows, dtype=np.float32, graphs=True):
    stage = build_stage(model, ops, dtype, MAX_KEYS)
    config = stage.config
    shape = BLOCKS * BLOCK_TOKENS, 2 * config.kv_size
    zeros = cupy.zeros if ops is decode_cuda else np.zeros
    cache = [zeros(shape, dtype) for _ in stage.weights.layers]
    decoder = ops.Decoder(stage, cache, rows, MAX_KEYS, config.vocab_size)
    if ops is decode_cuda and not graphs:
        decoder._graphs = None
    return decoder


def ragged_prompts(vocab, count=9, **settings):
    rng = np.random.default_rng(5)
    lengths = [1, 17, 33, 5, 64, 2, 70, 16, 40][:count]
    prompts = [rng.integers(3, vocab, length).tolist() for length in lengths]
    prompts[6][:64] = prompts[4]  # a prefix in common: four blocks
    new_tokens = [NEW_TOKENS - 4 * i for i in range(count)]
    return [
        Prompt(prompt, new, SamplingSettings(seed=i, **settings))
        for i, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True))
    ]


def generate(decoder, prompts, rows):
    """The tokens of each prompt."""
    found = [[] for _ in prompts]
    for event in Engine(decoder, BlockPool(BLOCKS), rows, MAX_KEYS).generate(prompts):
        found[event.number].append(event.token)
    assert [len(tokens) for tokens in found] == [prompt.max_new_tokens for prompt in prompts]
    return found


@every_model
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_greedy_tokens_are_those_of_numpy(name, rows, tmp_path):
    model = write_generating_model(name, tmp_path)
    expected = None
    for ops, graphs in ((decode_reference, False), (decode_cuda, True), (decode_cuda, False)):
        decoder = decoder_of(model, ops, rows, graphs=graphs)
        found = generate(decoder, ragged_prompts(decoder.stage.config.vocab_size), rows)
        expected = expected or found
        assert found == expected, f"{ops.__name__} {graphs=}"
        if ops is decode_cuda:
            assert all((step.graph is not None) == graphs for step in decoder._steps.values())


@every_model
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_replayed_steps_are_the_launched_ones(name, dtype, tmp_path):
    """Sampled: state, caches and tokens have to be the same ones step after step."""
    model = write_generating_model(name, tmp_path)
    settings = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2}
    kept = []
    for graphs in (True, False):
        decoder = decoder_of(model, decode_cuda, 6, dtype, graphs)
        prompts = ragged_prompts(decoder.stage.config.vocab_size, **settings)
        found = generate(decoder, prompts, 6)
        drawn = decoder.sampling.drawn.get()
        kept.append((found, drawn.tolist(), [layer.get().tobytes() for layer in decoder.cache]))
    assert kept[0][0] == kept[1][0]
    assert kept[0][1:] == kept[1][1:]


def admitted(decoder, prompts, seed=3):
    """Rows with blocks of their own, and the pass over all prompts."""
    segments, first_block = [], 1
    for row, prompt in enumerate(prompts):
        blocks = np.arange(first_block, first_block + blocks_for(MAX_KEYS))
        first_block += len(blocks)
        slots = (blocks[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()[:MAX_KEYS]
        decoder.admit(row, slots.astype(np.int32), SamplingSettings(seed=seed), prompt)
        segments.append(Segment(prompt, 0, slots[: len(prompt)].astype(np.int32)))
    return cached_batch(segments)


def test_steps_are_queued_before_the_last_one_is_looked_at(tmp_path):
    model = write_generating_model("gqa", tmp_path)
    prompts = [[5, 9, 11], [7] * 30, [3]]
    positions = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = []
    for waits in (True, False):
        decoder = decoder_of(model, decode_cuda, 3)
        results = [decoder.prefill(admitted(decoder, prompts), [0, 1, 2])]
        for step in range(20):
            if waits:
                results[-1]()
            results.append(decoder.step(positions + step))
        tokens.append(np.array([result() for result in results]))
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert len(np.unique(tokens[0])) > 5


@pytest.mark.parametrize("graphs", [True, False])
def test_a_token_whose_embedding_is_broken(graphs, tmp_path):
    """It is found in mid-answer, of the prompt that has it; all tokens before it have come."""
    model = write_generating_model("gqa", tmp_path)
    decoder = decoder_of(model, decode_reference, 3)
    prompts = ragged_prompts(decoder.stage.config.vocab_size)[:3]
    prompts = [replace(prompt, name=f"line {i}") for i, prompt in enumerate(prompts)]
    texts = generate(decoder, prompts, 3)
    others = set().union(*(prompt.token_ids for prompt in prompts), texts[0], texts[2])
    place = next(i for i, token in enumerate(texts[1]) if i > 4 and token not in others)
    place = texts[1].index(texts[1][place])
    decoder = decoder_of(model, decode_cuda, 3, graphs=graphs)
    decoder.stage.weights.embed_tokens[texts[1][place]] = np.nan
    found = [[] for _ in prompts]
    engine = Engine(decoder, BlockPool(BLOCKS), 3, MAX_KEYS)
    with pytest.raises(NotFiniteError, match=f"^line 1: .* new token {place + 2} are NaN"):
        for event in engine.generate(prompts):
            found[event.number].append(event.token)
    assert found == [texts[0][: place + 2], texts[1][: place + 1], texts[2][: place + 1]]
    assert engine.pool.free == engine.pool.capacity


def test_no_token_is_fed_as_token_0(tmp_path):
    """The step after one that found none is queued before anybody knows."""
    model = write_generating_model("gqa", tmp_path)
    prompts = [[5, 9, 11], [7] * 30, [3]]
    positions = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = []
    for fed in (0, NO_TOKEN):
        decoder = decoder_of(model, decode_cuda, 3)
        decoder.prefill(admitted(decoder, prompts), [0, 1, 2])()
        decoder.tokens[1] = fed
        tokens.append([decoder.step(positions + step)().tolist() for step in range(9)])
    assert tokens[0] == tokens[1]


def test_rows_that_are_left_out_stay_as_they_are(tmp_path):
    model = write_generating_model("gqa", tmp_path)
    prompts = [[5, 9, 11], [7] * 30, [3, 4]]
    decoder = decoder_of(model, decode_cuda, 8)
    decoder.prefill(admitted(decoder, prompts), [0, 1, 2])()
    before = [layer.get() for layer in decoder.cache]
    tokens, drawn = decoder.tokens.get(), decoder.sampling.drawn.get()
    found = decoder.step(np.array([-1, 30, -1], np.int32))()
    assert found.shape == (3,) and decoder.tokens.get()[1] == found[1]
    others = [0, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(decoder.tokens.get()[others], tokens[others])
    np.testing.assert_array_equal(decoder.sampling.drawn.get() - drawn, np.arange(8) == 1)
    slot = decoder.key_table.get()[1, 30]
    for old, new in zip(before, decoder.cache, strict=True):
        changed = np.flatnonzero((old != new.get()).any(axis=1))
        np.testing.assert_array_equal(changed, [slot])


@every_model
def test_logits_of_cached_passes_are_those_without_a_cache(name, tmp_path):
    """Beam search's way: a pass a token, against NumPy over the whole sequence at once."""
    model = write_generating_model(name, tmp_path)
    decoder = decoder_of(model, decode_cuda, 1)
    whole = decoder_of(model, decode_reference, 1)
    sequence = np.random.default_rng(1).integers(3, 300, 50).tolist()
    slots = np.random.default_rng(2).permutation(BLOCKS * BLOCK_TOKENS).astype(np.int32)
    for begin, end in ((0, 20), (20, 21), (21, 40), (40, 41), (41, 50)):
        batch = cached_batch([Segment(sequence[begin:end], begin, slots[:end])])
        found = decoder.next_logits(batch).get()
        expected = whole.next_logits(cached_batch([Segment(sequence[:end], 0, slots[:end])]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_a_bucket_is_captured_once_and_memory_is_shared(tmp_path):
    decoder = decoder_of(write_generating_model("gqa", tmp_path), decode_cuda, 70)
    idle = np.full(70, -1, np.int32)
    for count in (70, 3, 4, 33, 70, 1, 64, 65):
        decoder.step(idle[:count])()
    assert sorted(decoder._steps) == [1, 4, 48, 64, 70]
    pool = decoder._graphs._pool
    used = pool.total_bytes()
    for count in (70, 3, 33, 1):
        decoder.step(idle[:count])()
    assert pool.total_bytes() == used and pool.used_bytes() < used
