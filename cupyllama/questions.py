"""Questions to token rows: all of a run that a device need not know."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cupyllama.config import ModelConfig
from cupyllama.tasks.conventions import CONVENTIONS, TokenRows, token_rows
from cupyllama.tasks.files import Task, first_questions, load_task
from cupyllama.tasks.question import Question
from cupyllama.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from cupyllama.score import ScoreOptions


@dataclass(frozen=True)
class Questions:
    """Everything about the questions that a device need not know."""

    task: Task
    asked: list[Question]
    tokenizer: Tokenizer
    bos: bool
    rows: TokenRows


def read_questions(options: "ScoreOptions", config: ModelConfig) -> Questions:
    """Questions to token rows."""
    convention = CONVENTIONS[options.convention]
    tokenizer = load_tokenizer(options.model, options.tokenizer)
    check_vocabulary(tokenizer, config.vocab_size, options.model)
    task = load_task(options.data, options.convention, options.task)
    asked = first_questions(task.questions, options.limit)
    bos = options.bos if options.bos is not None else convention.bos
    bos = tokenizer.adds_bos if bos is None else bos
    return Questions(
        task,
        asked,
        tokenizer,
        bos,
        token_rows(asked, tokenizer, convention, bos, config.max_length),
    )
