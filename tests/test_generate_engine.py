"""Generation on the CPU: Transformers' text, with a cache and without, alone and in company."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine import build_stage
from test_tensor_parallel import Meeting
from tiny_generation import generating_crc32, write_generating_model
from tiny_models import write_tiny_model

from cupyllama.config import Share, load_config
from cupyllama.errors import DeviceError, ModelError, NotFiniteError
from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.generation.beam import beam_search
from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from cupyllama.generation.engine import PREFILL_TOKENS, Engine, Prompt
from cupyllama.generation.settings import NO_TOKEN, SamplingSettings
from cupyllama.ops import decode_reference, reference
from cupyllama.parallel.group import Group

RECORDED = json.loads((Path(__file__).parent / "data" / "transformers_generate.json").read_text())
NAMES = sorted(RECORDED["models"])
DRAWN = SamplingSettings(temperature=1.0, top_k=50, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A function from a name to all layers of the model, loaded once."""
    folder, found = tmp_path_factory.mktemp("models"), {}

    def stage(name: str):
        if name not in found:
            directory = write_generating_model(name, folder / name)
            found[name] = build_stage(directory, decode_reference)
        return found[name]

    return stage


def make_engine(stage, rows: int, blocks: int = 64, max_keys: int = 128) -> Engine:
    """An engine whose cache is NaN wherever nothing was written."""
    shape = blocks * BLOCK_TOKENS, 2 * stage.config.kv_size
    dtype = stage.weights.embed_tokens.dtype
    cache = [np.full(shape, np.nan, dtype) for _ in stage.weights.layers]
    vocab_size = stage.config.vocab_size
    decoder = decode_reference.Decoder(stage, cache, rows, max_keys, vocab_size)
    return Engine(decoder, BlockPool(blocks), rows, max_keys)


def texts(engine: Engine, prompts: list[Prompt]) -> list[list[int]]:
    """The new tokens of each prompt; nothing comes after the last, and all is given back."""
    found = [[] for _ in prompts]
    finished = set()
    for number, token, is_last in engine.generate(prompts):
        assert number not in finished
        found[number].append(token)
        if is_last:
            finished.add(number)
    assert finished == set(range(len(prompts)))
    assert engine.pool.free == engine.pool.capacity
    return found


def without_cache(stage, prompt: Prompt) -> list[int]:
    """Greedy text by computing everything again for each token, in slots of their own."""
    ids = list(prompt.token_ids)
    for _ in range(prompt.max_new_tokens):
        slots = np.arange(len(ids), dtype=np.int32)
        shape = len(ids), 2 * stage.config.kv_size
        cache = [np.empty(shape, stage.weights.embed_tokens.dtype) for _ in stage.weights.layers]
        logits = stage.next_logits(cached_batch([Segment(ids, 0, slots)]), None, cache)
        ids.append(int(logits[0].argmax()))
    return ids[len(prompt.token_ids) :]


def greedy(name: str, count: int = 64) -> list[Prompt]:
    return [Prompt(ids, count) for ids in RECORDED["models"][name]["prompts"]]


# --- against Transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_transformers(name, stages):
    assert generating_crc32(name) == RECORDED["weights_crc32"][name]
    expected = RECORDED["models"][name]["greedy"]
    assert [len(text) for text in expected] == [64] * 5
    for rows in (5, 2, 1):
        assert texts(make_engine(stages(name), rows), greedy(name)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_beam_search_equals_transformers(name, stages):
    engine = make_engine(stages(name), 1)
    early = 0
    for search in RECORDED["models"][name]["beams"]:
        prompt = RECORDED["models"][name]["prompts"][search["prompt"]]
        found = beam_search(engine.decoder, engine.pool, prompt, 4, 24, frozenset(search["eos"]))
        expected = search["hypotheses"]
        assert [one.token_ids for one in found] == [one["tokens"] for one in expected]
        scores = [one["score"] for one in expected]
        np.testing.assert_allclose([one.score for one in found], scores, rtol=0, atol=1e-4)
        assert engine.pool.free == engine.pool.capacity
        early += max(len(one["tokens"]) for one in expected) < 24
    assert early  # in one of them all hypotheses end with an EOS, and the search before its limit


def test_one_beam_is_greedy(stages):
    engine = make_engine(stages("gqa"), 1)
    for prompt, text in zip(greedy("gqa"), RECORDED["models"]["gqa"]["greedy"], strict=True):
        found = beam_search(engine.decoder, engine.pool, prompt.token_ids, 1, 64)
        assert [one.token_ids for one in found] == [text]


def test_beams_that_do_not_fit(stages):
    engine = make_engine(stages("gqa"), 1, blocks=4)
    with pytest.raises(DeviceError, match="4 beams of 20 new tokens after 3 take 80 keys"):
        beam_search(engine.decoder, engine.pool, [5, 6, 7], 4, 20)
    assert len(beam_search(engine.decoder, engine.pool, [5, 6, 7], 4, 12)) == 4  # 47 keys of 48


# --- with a cache as without ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa", "opt_350m_varied"])
def test_without_a_cache_it_is_the_same_text(name, stages):
    for prompt, text in zip(greedy(name), RECORDED["models"][name]["greedy"], strict=True):
        assert without_cache(stages(name), prompt) == text


@pytest.mark.parametrize("name", ["gqa", "opt_varied"])
def test_int8_matrices(name, tmp_path):
    stage = build_stage(write_generating_model(name, tmp_path), decode_reference, quantize="int8")
    found = texts(make_engine(stage, 3), greedy(name, 20))
    assert found == [without_cache(stage, prompt) for prompt in greedy(name, 20)]


@pytest.mark.parametrize(
    ("dtype", "quantize", "tolerance"),
    [
        (np.float32, None, 1e-4),
        (np.float16, None, 0.05),
        (np.float32, "fp8", 0.5),  # a rounding apart, what is multiplied may be a step of e4m3
    ],
)
@pytest.mark.parametrize("name", ["odd", "wide_heads", "opt_350m"])
def test_a_prompt_in_pieces_has_the_logits_that_it_has_whole(
    name, dtype, quantize, tolerance, tmp_path
):
    directory = write_tiny_model(name, tmp_path)
    stage = build_stage(directory, decode_reference, dtype, quantize=quantize)
    rng = np.random.default_rng(3)
    ids = rng.integers(4, stage.config.vocab_size, 37).tolist()
    slots = rng.permutation(50).astype(np.int32)[: len(ids)]
    cache = [np.full((50, 2 * stage.config.kv_size), np.nan, dtype) for _ in stage.weights.layers]
    last = []
    for first, end in ((0, 20), (20, 21), (21, 36), (36, 37)):
        batch = cached_batch([Segment(ids[first:end], first, slots[:end])])
        last.append(stage.next_logits(batch, None, cache)[0])
    places = [19, 20, 35, 36]
    whole = [np.full_like(layer, np.nan) for layer in cache]
    pieces = [Segment(ids[: place + 1], 0, slots[: place + 1]) for place in places]
    for piece, logits in zip(pieces, last, strict=True):
        expected = stage.next_logits(cached_batch([piece]), None, whole)[0]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
        assert np.ptp(expected) > 3


def test_which_rows_are_wanted():
    slots = np.arange(100, 140, dtype=np.int32)
    segments = [
        Segment([7, 8, 9], 0, slots[:3]),
        Segment([4], 5, slots[10:16]),
        Segment([1, 2], 2, slots[20:24]),
    ]
    batch = cached_batch(segments, [True, False, True])
    assert batch.logit_rows.tolist() == [2, 5]
    assert batch.positions.tolist() == [0, 1, 2, 5, 2, 3]
    assert batch.slots.tolist() == [100, 101, 102, 115, 122, 123]
    assert batch.segment_start.tolist() == [0, 3, 4, 6]
    assert batch.key_start.tolist() == [0, 3, 9, 13]
    assert cached_batch(segments).logit_rows.tolist() == [2, 3, 5]
    with pytest.raises(AssertionError):
        cached_batch([Segment([7, 8], 0, slots[:3])])
    with pytest.raises(AssertionError):
        cached_batch([Segment([], 3, slots[:3])])


def test_logits_of_a_shared_vocabulary(tmp_path):
    config = load_config(write_tiny_model("odd", tmp_path))
    whole = np.random.default_rng(0).standard_normal((3, config.vocab_size)).astype(np.float32)
    for size in (2, 3):
        meeting = Meeting(size)

        def work(rank, meeting=meeting, size=size):
            share = Share(rank, size)
            group = Group(reference, config.part(share), meeting.exchange(rank))
            tokens = share.vocabulary(config.vocab_size)
            return group.logits(whole[:, tokens.start : tokens.stop].copy())

        for found in meeting.each(work):
            np.testing.assert_array_equal(found, whole)


# --- logits that are no numbers -------------------------------------------------------------------

# What becomes of a pass's logits.
BROKEN = {
    "one NaN": lambda logits: logits.__setitem__((0, 200), np.nan),
    "one infinity": lambda logits: logits.__setitem__((0, 200), np.inf),
    "nothing else": lambda logits: logits.fill(-np.inf),
}


def break_from(engine, monkeypatch, number: int, breaking) -> None:
    """From that pass on, counted from 1."""
    passes, whole = iter(range(1, 1000)), engine.decoder.next_logits

    def next_logits(batch):
        logits = whole(batch)
        if next(passes) >= number:
            breaking(logits)
        return logits

    monkeypatch.setattr(engine.decoder, "next_logits", next_logits)


def is_refused(error, name: str, number: int) -> None:
    assert isinstance(error.value, ModelError) and error.value.exit_code == 3
    assert str(error.value) == f"{name}: the logits of new token {number} are NaN or infinite"
    assert "--dtype bfloat16 or float32" in error.value.hint


@pytest.mark.parametrize("number", [1, 2, 9])
@pytest.mark.parametrize("settings", [SamplingSettings(), DRAWN])
@pytest.mark.parametrize("case", BROKEN)
def test_text_of_a_broken_model(case, settings, number, stages, monkeypatch):
    """All tokens before it have come, and none after it does."""
    engine = make_engine(stages("gqa"), 2)
    prompt = Prompt(RECORDED["models"]["gqa"]["prompts"][0], 30, settings, name="file, line 1")
    expected = texts(engine, [prompt])[0]
    break_from(engine, monkeypatch, number, BROKEN[case])
    found = []
    with pytest.raises(NotFiniteError) as error:
        found.extend(event.token for event in engine.generate([prompt]))
    is_refused(error, "file, line 1", number)
    assert found == expected[: number - 1]
    assert engine.pool.free == engine.pool.capacity


@pytest.mark.parametrize("number", [1, 2, 9])
@pytest.mark.parametrize("case", BROKEN)
def test_beams_of_a_broken_model(case, number, stages, monkeypatch):
    engine = make_engine(stages("gqa"), 1)
    break_from(engine, monkeypatch, number, BROKEN[case])
    with pytest.raises(NotFiniteError) as error:
        beam_search(engine.decoder, engine.pool, [5, 6, 7], 4, 20, name="file, line 1")
    is_refused(error, "file, line 1", number)
    assert engine.pool.free == engine.pool.capacity


def test_logits_of_minus_infinity_are_numbers(stages, monkeypatch):
    engine, expected = make_engine(stages("gqa"), 1), RECORDED["models"]["gqa"]["greedy"][0]
    never = [token for token in range(300) if token not in expected]

    def forbid(logits):
        logits[:, never] = -np.inf

    break_from(engine, monkeypatch, 1, forbid)
    assert texts(engine, greedy("gqa")[:1]) == [expected]
    prompt = greedy("gqa")[0].token_ids
    assert beam_search(engine.decoder, engine.pool, prompt, 1, 64)[0].token_ids == expected


def test_a_token_whose_embedding_is_broken(tmp_path):
    """It is found in mid-answer, of the prompt that has it; behind an EOS it is none's."""
    stage = build_stage(write_generating_model("gqa", tmp_path), decode_reference)
    prompt, text = greedy("gqa")[2], RECORDED["models"]["gqa"]["greedy"][2]
    place = next(i for i in range(5, 60) if text.index(text[i]) == i)
    assert text[place] not in prompt.token_ids
    stage.weights.embed_tokens[text[place]] = np.nan
    found = []
    with pytest.raises(NotFiniteError) as error:
        found.extend(event.token for event in make_engine(stage, 2).generate([prompt]))
    is_refused(error, "the prompt", place + 2)
    assert found == text[: place + 1]
    ending = Prompt(prompt.token_ids, 64, eos_token_ids=frozenset([text[place]]))
    assert texts(make_engine(stage, 2), [ending]) == [text[: place + 1]]


def test_no_token_is_noticed_in_the_row_that_has_it():
    """Of three prompts, by the name of its own, while a step is queued ahead."""
    decoder = Remembering(4, 64, 32)
    step, steps = decoder.step, iter(range(100))

    def breaking(positions):
        tokens, number = step(positions), next(steps)
        return lambda: np.where(np.arange(3) == (1 if number == 4 else -1), NO_TOKEN, tokens())

    decoder.step = breaking
    prompts = [Prompt([1, row], 20, name=f"line {row}") for row in range(3)]
    found = [[] for _ in prompts]
    with pytest.raises(NotFiniteError) as error:
        for event in Engine(decoder, BlockPool(32), 4, 64).generate(prompts):
            found[event.number].append(event.token)
    is_refused(error, "line 1", 6)
    assert [len(tokens) for tokens in found] == [6, 5, 5]
    assert decoder.not_looked_at == []


# --- company --------------------------------------------------------------------------------------


def drawn(name: str, count: int) -> list[Prompt]:
    """Prompts of many lengths, each with a seed, a length and an end of its own."""
    rng = np.random.default_rng(count)
    stem = rng.integers(4, 300, 40).tolist()
    prompts = []
    for number in range(count):
        own = rng.integers(4, 300, int(rng.integers(1, 30))).tolist()
        ids = stem[: int(rng.integers(0, 40))] * (number % 3 > 0) + own
        settings = [DRAWN, SamplingSettings(), SamplingSettings(0.7, top_p=0.9)][number % 3]
        settings = SamplingSettings(**{**vars(settings), "seed": number})
        eos = frozenset(rng.integers(4, 300, 20).tolist())
        prompts.append(Prompt(ids, int(rng.integers(1, 40)), settings, eos))
    return prompts


@pytest.mark.parametrize(("name", "blocks"), [("gqa", 64), ("gqa", 9), ("opt_350m_varied", 20)])
def test_a_text_is_the_same_in_company_as_alone(name, blocks, stages):
    """Few rows, and blocks so few that prompts wait for them."""
    stage, prompts = stages(name), drawn(name, 14)
    found = texts(make_engine(stage, 4, blocks), prompts)
    assert found == [texts(make_engine(stage, 1), [prompt])[0] for prompt in prompts]
    ends = [text[-1] in prompt.eos_token_ids for text, prompt in zip(found, prompts, strict=True)]
    assert any(ends) and not all(ends)
    for text, prompt, is_eos in zip(found, prompts, ends, strict=True):
        assert not prompt.eos_token_ids & set(text[:-1])
        assert len(text) == prompt.max_new_tokens or is_eos
    assert len({tuple(text) for text in found}) == 14


def test_settings_are_told_of_the_prompt(stages):
    """A penalty so large that no token of the prompt or of the text comes again."""
    prompts = [
        Prompt(ids, 64, SamplingSettings(repetition_penalty=1e6))
        for ids in RECORDED["models"]["gqa"]["prompts"]
    ]
    for prompt, text in zip(prompts, texts(make_engine(stages("gqa"), 2), prompts), strict=True):
        assert len(set(text) | set(prompt.token_ids)) == 64 + len(set(prompt.token_ids))


def test_prefixes_are_computed_once(stages):
    """Of prompts in one pass, and of later ones."""
    stage = stages("gqa")
    rng = np.random.default_rng(8)
    stem = rng.integers(4, 300, 3 * BLOCK_TOKENS).tolist()
    prompts = [Prompt(stem + rng.integers(4, 300, n).tolist(), 20) for n in (1, 5, 20)]
    prompts.append(Prompt(stem, 20))  # its last block is computed again, for the logits
    engine = make_engine(stage, 4)
    found = texts(engine, prompts)
    assert engine.prompt_tokens_computed == 48 + (1 + 5 + 20) + 16
    assert found == [without_cache(stage, prompt) for prompt in prompts]
    later = Prompt(prompts[2].token_ids[:65] + [9, 9], 20)
    assert texts(engine, [later]) == [without_cache(stage, later)]
    assert engine.prompt_tokens_computed == 48 + 26 + 16 + 3  # four blocks lie there


def test_shared_blocks_take_no_room(stages):
    """Eight prompts of three blocks have room beside one another in a cache of ten."""
    stem = np.random.default_rng(8).integers(4, 300, 2 * BLOCK_TOKENS).tolist()
    prompts = [Prompt([*stem, number], 10) for number in range(8)]
    engine = make_engine(stages("gqa"), 8, blocks=11)
    first = [event.number for event, _ in zip(engine.generate(prompts), range(8), strict=False)]
    assert first == list(range(8))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("by", ["engine", "beams"])
def test_a_prompt_whose_pass_failed_is_computed_again(by, error, stages, monkeypatch):
    """Its blocks were promised to others that begin like it."""
    prompt = greedy("gqa")[4]
    expected = RECORDED["models"]["gqa"]["greedy"][4]
    engine = make_engine(stages("gqa"), 1)

    def text():
        if by == "engine":
            return texts(engine, [prompt])[0]
        return beam_search(engine.decoder, engine.pool, prompt.token_ids, 1, 64)[0].token_ids

    def failing(batch):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "next_logits", failing)
        with pytest.raises(DeviceError if error is MemoryError else error):
            text()
    assert engine.pool.free == engine.pool.capacity
    assert text() == expected


def test_what_does_not_fit_is_said_before_anything_is_computed(stages):
    engine = make_engine(stages("gqa"), 2, blocks=4, max_keys=100)
    fits = Prompt([5] * 20, 29)  # 48 keys: the last token is not fed
    with pytest.raises(DeviceError, match="20 tokens with 30 new ones .* has room for 49"):
        next(engine.generate([fits, Prompt([5] * 20, 30)]))
    assert engine.prompt_tokens_computed == 0
    assert len(texts(engine, [fits, fits])[1]) == 29
    engine = make_engine(stages("gqa"), 2, blocks=64, max_keys=20)
    with pytest.raises(DeviceError, match="has room for 21"):
        engine.check(Prompt([5] * 20, 2))


def test_cancelled_sequences_make_room(stages):
    expected = RECORDED["models"]["gqa"]["greedy"]
    engine = make_engine(stages("gqa"), 2)
    found = [[] for _ in range(5)]
    for number, token, _ in engine.generate(greedy("gqa")):
        found[number].append(token)
        if number == 0 and len(found[0]) == 3:
            engine.cancel(0)
            engine.cancel(3)  # which waits
    kept = [3, 64, 64, 0, 64]
    assert found == [text[:count] for text, count in zip(expected, kept, strict=True)]
    assert engine.pool.free == engine.pool.capacity


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_all_ends_at_once_and_the_engine_goes_on(how, stages):
    engine = make_engine(stages("gqa"), 2)
    events = engine.generate(greedy("gqa"))
    for _ in range(9):
        next(events)
    if how == "cancel":
        engine.cancel()
        assert list(events) == []
    else:
        events.close()
    assert engine.pool.free == engine.pool.capacity
    assert texts(engine, greedy("gqa")) == RECORDED["models"]["gqa"]["greedy"]


# --- what is queued -------------------------------------------------------------------------------


class Remembering:
    """In the place of a decoder and a model: the cache holds the tokens themselves.

    The next token is a check sum of all that is read there, so that one slot given away too early,
    or filled with another sequence's tokens, shows in all that follows.
    """

    stage = SimpleNamespace(ops=decode_reference)

    def __init__(self, rows: int, max_keys: int, blocks: int, links=None):
        self.links = links
        self.cache = np.full(blocks * BLOCK_TOKENS, -1)
        self.table = np.zeros((rows, max_keys), np.int32)
        self.tokens = np.zeros(rows, np.int32)
        self.not_looked_at: list[set[int]] = []
        self.most_ahead = self.passes = 0

    def admit(self, row, slots, settings, seen):
        assert not any(row in written for written in self.not_looked_at)
        self.table[row] = 0
        self.table[row, : len(slots)] = slots

    def prefill(self, batch, rows):
        self.cache[batch.slots] = batch.token_ids
        for number, row in enumerate(rows):
            keys = batch.key_index[batch.key_start[number] : batch.key_start[number + 1]]
            self.tokens[row] = next_token(self.cache[keys])
        return self.later(list(rows), rows)

    def step(self, positions):
        rows = np.flatnonzero(positions >= 0)
        slots = self.table[rows, positions[rows]]
        assert (slots >= BLOCK_TOKENS).all() and len(set(slots)) == len(slots)
        self.cache[slots] = self.tokens[rows]
        for row in rows:
            self.tokens[row] = next_token(self.cache[self.table[row, : positions[row] + 1]])
        return self.later(range(len(positions)), rows)

    def later(self, wanted, written):
        tokens, entry = self.tokens[list(wanted)].copy(), set(map(int, written))
        self.not_looked_at.append(entry)
        self.passes += 1

        def wait():
            self.most_ahead = max(self.most_ahead, len(self.not_looked_at))
            assert self.not_looked_at.pop(0) is entry
            return tokens

        return wait


def next_token(tokens) -> int:
    return zlib.crc32(np.asarray(tokens, np.int64).tobytes()) % 50


@pytest.mark.parametrize("links", [None, "some"])
@pytest.mark.parametrize("seed", range(4))
def test_random_prompts(seed, links):
    rng = np.random.default_rng(seed)
    rows, blocks = int(rng.integers(1, 7)), int(rng.integers(8, 40))
    prompts, expected = [], []
    for _ in range(60):
        ids = [3] * BLOCK_TOKENS * int(rng.integers(3))
        ids += rng.integers(0, 2, int(rng.integers(1, 40))).tolist()
        most = min(int(rng.integers(1, 60)), (blocks - 1) * BLOCK_TOKENS + 1 - len(ids))
        eos = frozenset(rng.integers(0, 50, 2).tolist())
        prompts.append(Prompt(ids, most, eos_token_ids=eos))
        text = list(ids)
        while len(text) < len(ids) + most and not (len(text) > len(ids) and text[-1] in eos):
            text.append(next_token(text))
        expected.append(text[len(ids) :])
    decoder = Remembering(rows, 200, blocks, links)
    engine = Engine(decoder, BlockPool(blocks), rows, 200)
    assert texts(engine, prompts) == expected
    assert decoder.not_looked_at == []
    assert engine.prompt_tokens_computed < sum(len(prompt.token_ids) for prompt in prompts)
    # A step is queued before the last one is looked at, but not where stages wait for its tokens.
    assert decoder.most_ahead == (3 if links is None else 2)


def test_no_step_is_queued_for_what_has_all_its_tokens():
    decoder = Remembering(4, 64, 32)
    prompts = [Prompt([1, 2], count) for count in (1, 4, 2)]
    assert [len(text) for text in texts(Engine(decoder, BlockPool(32), 4, 64), prompts)] == [
        1,
        4,
        2,
    ]
    assert decoder.passes == 4


def test_long_prompts_are_fed_in_several_passes():
    decoder = Remembering(8, 4000, 2000)
    long = [Prompt([number] * 1500, 1) for number in range(8)]
    texts(Engine(decoder, BlockPool(2000), 8, 4000), long)
    assert decoder.passes == 3 and PREFILL_TOKENS == 4096
    assert blocks_for(1500) * 8 < 2000
