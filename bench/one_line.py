"""Errors of ours as one line in place of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from cupyllama.errors import CupyllamaError


@contextmanager
def one_line() -> Iterator[None]:
    """Errors of ours within it end the command with one line."""
    try:
        yield
    except CupyllamaError as error:
        raise click.ClickException(f"{error}. {error.hint}".strip()) from error
