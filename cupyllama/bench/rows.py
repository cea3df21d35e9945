"""Token rows to measure with: of real text, or of HellaSwag's lengths where there is none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cupyllama.config import ModelConfig
from cupyllama.errors import ModelError, UsageError
from cupyllama.packing import TokenRow
from cupyllama.tasks.conventions import CONVENTIONS, TokenRows, token_rows
from cupyllama.tasks.files import load_task
from cupyllama.tokenizer import load_tokenizer

# Percentiles of HellaSwag's 10,042 validation questions in tokens of LLaMA's tokenizer. Contexts
# are counted without BOS: mean 56.2; endings: mean 33.0; the longest row feeds 169 tokens.
_PERCENT = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
_CONTEXT_TOKENS = (12, 22, 27, 35, 44, 52, 58, 64, 69, 74, 81, 87, 97, 118)
_ENDING_TOKENS = (2, 9, 11, 16, 23, 29, 34, 38, 42, 47, 53, 59, 69, 98)
# Correlation of an ending's length with the context's is 0.63, with another ending's 0.66: half of
# the questions are captions of videos, which are short, and half are from WikiHow.
_OF_CONTEXT, _OF_QUESTION, _OF_ENDING = 0.63, 0.51, 0.58
_ENDINGS = 4

_BOS, _FIRST_TOKEN = 1, 3


def read_rows(
    config: ModelConfig, questions: int, data: Path | None, tokenizer: Path | None
) -> TokenRows:
    """Questions spread over the file `data`, or generated ones where there is no file.

    Raises:
        UsageError: one of `data` and `tokenizer` without the other.
        DataError: nothing there, or not what it should be.
        ModelError: the tokenizer is not usable, or has more tokens than the model.
    """
    if (data is None) != (tokenizer is None):
        raise UsageError(
            "text is tokenised with the tokenizer that is given beside it",
            "Give both --data FILE and --tokenizer FILE, or neither to generate token rows.",
        )
    if data is None:
        return hellaswag_like_rows(questions, config.vocab_size)
    tokens = load_tokenizer(tokenizer.parent, tokenizer)
    if tokens.size > config.vocab_size:
        raise ModelError(
            f"{tokenizer}: has {tokens.size:,} tokens, and the shape {config.vocab_size:,}",
            "Give the shape's own tokenizer, or a smaller one.",
        )
    everything = load_task(data, "lm-eval").questions
    count = min(questions, len(everything))
    spread = [everything[i * len(everything) // count] for i in range(count)]
    bos = tokens.bos_token_id is not None
    return token_rows(spread, tokens, CONVENTIONS["lm-eval"], bos, config.max_length)


def hellaswag_like_rows(questions: int, vocab_size: int, seed: int = 0) -> TokenRows:
    """Random tokens, four endings a question, in lengths distributed as HellaSwag's are.

    The same rows for the same arguments. BOS and the context are all that rows share: on the text
    itself, packing saves 4 to 5 % more.
    """
    random = np.random.default_rng(seed)
    context, question = random.standard_normal((2, questions))
    own = random.standard_normal((questions, _ENDINGS))
    ending = (_OF_CONTEXT * context + _OF_QUESTION * question)[:, None] + _OF_ENDING * own
    lengths = zip(_spread(context, _CONTEXT_TOKENS), _spread(ending, _ENDING_TOKENS), strict=True)
    rows: list[TokenRow] = []
    for context_tokens, ending_tokens in lengths:
        begin = [_BOS, *_tokens(random, context_tokens, vocab_size)]
        _add_question(rows, begin, ending_tokens, vocab_size, random)
    return _with_starts(rows)


def few_shot_rows(
    questions: int,
    vocab_size: int,
    shared: int = 1500,
    ending: int = 30,
    seed: int = 0,
    own: bool = False,
) -> TokenRows:
    """Questions of four endings each behind a long beginning, such as worked examples.

    Args:
        own: every question has a beginning of its own; else all have the same.
    """
    random = np.random.default_rng(seed)
    rows: list[TokenRow] = []
    for number in range(questions):
        if own or number == 0:
            begin = [_BOS, *_tokens(random, shared - 1, vocab_size)]
        _add_question(rows, begin, [ending] * _ENDINGS, vocab_size, random)
    return _with_starts(rows)


def _add_question(
    rows: list[TokenRow],
    begin: list[int],
    endings: Sequence[int],
    vocab_size: int,
    random: np.random.Generator,
) -> None:
    for ending in endings:
        row = begin + _tokens(random, ending, vocab_size)
        rows.append(TokenRow(row, len(begin), len(rows)))


def _with_starts(rows: list[TokenRow]) -> TokenRows:
    return TokenRows(rows, np.arange(0, len(rows) + 1, _ENDINGS), 0)


def _tokens(random: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    return random.integers(_FIRST_TOKEN, vocab_size, count).tolist()


def _spread(values: np.ndarray, percentiles: Sequence[int]) -> np.ndarray:
    """Lengths in the order of the values: from the shortest to the longest, evenly in percent."""
    rank = values.ravel().argsort().argsort()
    percent = 100 * rank / max(len(rank) - 1, 1)
    lengths = np.rint(np.interp(percent, _PERCENT, percentiles)).astype(int)
    return lengths.reshape(values.shape)
