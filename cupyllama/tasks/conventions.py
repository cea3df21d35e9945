"""How a question is turned into token rows: three programs, three answers for one model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cupyllama.errors import DataError, ModelError
from cupyllama.packing import TokenRow, common_prefix_length
from cupyllama.tasks.question import Question, shortened
from cupyllama.tokenizer import Tokenizer, can_split


@dataclass(frozen=True)
class Convention:
    """What differs between the programs that score HellaSwag."""

    name: str
    bos: bool | None  # None: as the tokenizer is configured
    headline: str  # the normalisation whose accuracy the program reports


CONVENTIONS = {
    # lm-evaluation-harness 0.4.9.2 and on: context and continuation tokenised together.
    "lm-eval": Convention("lm-eval", None, "acc_norm"),
    # The FasterTransformer fork for LLaMA-30B: choices tokenised apart, no BOS.
    "fastertransformer": Convention("fastertransformer", False, "acc_tokens"),
    # llama.cpp --hellaswag: scored from the first token in which the choices differ.
    "llamacpp": Convention("llamacpp", True, "acc_tokens"),
}


@dataclass(frozen=True)
class TokenRows:
    """One row a choice, in the order of the questions."""

    rows: list[TokenRow]
    choice_start: np.ndarray  # (questions + 1,) question q has the rows from [q] to [q + 1]
    truncated: int  # rows that lost tokens at their beginning

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens that each row is scored on: (rows,)."""
        return np.array([len(row.token_ids) - row.first_target for row in self.rows], np.int64)

    @property
    def longest(self) -> int:
        """The most tokens that a row feeds."""
        return max((len(row.token_ids) - 1 for row in self.rows), default=0)

    def digest(self) -> str:
        """SHA-256 of the rows and of what is predicted in them."""
        sha = hashlib.sha256()
        for row in self.rows:
            sha.update(np.array([row.first_target, *row.token_ids], "<i4").tobytes())
        return sha.hexdigest()

    @property
    def tokens_asked(self) -> int:
        """Tokens that would be fed if each row were computed alone and whole."""
        return sum(len(row.token_ids) - 1 for row in self.rows)


def token_rows(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    convention: Convention,
    bos: bool,
    max_length: int,
) -> TokenRows:
    """Tokenise every choice of every question.

    A row of more than `max_length` fed tokens keeps its last ones, as lm-eval does.

    Raises:
        ModelError: BOS is wanted and the tokenizer has none.
        DataError: a choice that has no tokens of its own, or more than `max_length`.
    """
    if bos and tokenizer.bos_token_id is None:
        raise ModelError(f"{tokenizer.path}: has no BOS token", "Give --bos no.")
    prefix = [tokenizer.bos_token_id] if bos else []
    choice_start = np.concatenate([[0], np.cumsum([len(q.choices) for q in questions])])
    encode = _encode_apart if convention.name == "fastertransformer" else _encode_together
    contexts, wholes = encode(questions, tokenizer)
    rows, truncated = [], 0
    for number, question in enumerate(questions):
        first, last = choice_start[number : number + 2]
        bodies = wholes[first:last]
        context_length = len(contexts[number])
        if convention.name == "llamacpp":
            context_length = _common_prefix(bodies)
        elif convention.name == "lm-eval":  # which goes on from the context's own tokens
            bodies = [contexts[number] + body[context_length:] for body in bodies]
        context_prefix = prefix
        if context_length == 0:  # with BOS or without, something has to predict the first token
            context_prefix = [_start_token(tokenizer, _named(number, question))]
        for choice, body in enumerate(bodies):
            token_ids = context_prefix + body
            targets = len(body) - context_length
            if not 1 <= targets <= max_length:
                raise DataError(
                    f"{_named(number, question)}, choice {choice}: has {targets} tokens of its "
                    f"own, and 1 to {max_length} can be scored: "
                    f"{shortened(question.choices[choice])}",
                    "Shorten the choice, or leave the question out."
                    if targets
                    else "Is it part of the context already? Leave the question out.",
                )
            if len(token_ids) - 1 > max_length:
                token_ids = token_ids[-(max_length + 1) :]
                truncated += 1
            rows.append(TokenRow(token_ids, len(token_ids) - targets, int(first) + choice))
    return TokenRows(rows, choice_start, truncated)


def _encode_together(
    questions: Sequence[Question], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts, and contexts with each choice, as lm-eval splits them (TemplateLM._encode_pair)."""
    contexts = [question.context.rstrip() for question in questions]
    pairs = [(number, c) for number, q in enumerate(questions) for c in q.choices]
    # The same ids in a third of the time: a context need not be tokenised again for each choice.
    apart = [
        tokenizer.splits_at_spaces and can_split(questions[number].context, choice)
        for number, choice in pairs
    ]
    context_ids = tokenizer.encode(contexts)
    ids = tokenizer.encode(
        [
            choice if split else f"{questions[number].context} {choice}"
            for (number, choice), split in zip(pairs, apart, strict=True)
        ]
    )
    wholes = [
        context_ids[number] + own if split else own
        for (number, _), own, split in zip(pairs, ids, apart, strict=True)
    ]
    return context_ids, wholes


def _encode_apart(
    questions: Sequence[Question], tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[int]]]:
    contexts = tokenizer.encode([question.context for question in questions])
    choices = iter(tokenizer.encode([choice for q in questions for choice in q.choices]))
    wholes = [
        context + next(choices)
        for context, question in zip(contexts, questions, strict=True)
        for _ in question.choices
    ]
    return contexts, wholes


def _common_prefix(bodies: Sequence[list[int]]) -> int:
    """Tokens that all rows of a question begin with; each keeps at least one of its own."""
    first = np.array(bodies[0])
    shared = min(common_prefix_length(first, np.array(body)) for body in bodies)
    return min(shared, min(len(body) for body in bodies) - 1)


def _start_token(tokenizer: Tokenizer, name: str) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError(
            f"{name}: an empty context needs a BOS token, and {tokenizer.path} has none",
            "Give the question a context.",
        )
    return tokenizer.bos_token_id


def _named(number: int, question: Question) -> str:
    return f"question {number}" + (f" ({question.place})" if question.place else "")
