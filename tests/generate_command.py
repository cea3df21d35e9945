"""`cupyllama generate` as its tests drive it, and what they give it: prompts, and a slow model."""

import json

import pytest
from click.testing import CliRunner

from cupyllama.cli import cli
from cupyllama.tasks.files import demo_directory

DEMO = demo_directory()
PROMPTS = ["The man on the roof", "A lady walks to a", "She pours", "How to choose a bike:"]
# Runs the command line with a model that takes a tenth of a second for a token.
SLOW = """
import sys, time
from cupyllama.ops import decode_reference
step = decode_reference.Decoder.step
def slow(self, positions):
    time.sleep(0.1)
    return step(self, positions)
decode_reference.Decoder.step = slow
from cupyllama.cli import cli
sys.argv[:1] = ["cupyllama"]
cli()
"""


def generate(*arguments, model="--demo", stdin=None):
    fixed = ["generate", model, "--device", "cpu", *arguments]
    return CliRunner().invoke(cli, list(map(str, fixed)), input=stdin)


def text_of(*arguments):
    """What goes to stdout, without the end of the line."""
    result = generate("--quiet", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n") and result.stderr == "", result.output
    return result.stdout[:-1]


def text_of_file(*arguments, path):
    """The records of --output; with several prompts nothing else is printed."""
    result = generate("--quiet", "--output", path, *arguments)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    return records_of(path)


def text_of_stdin(path, *arguments):
    result = generate("--quiet", *arguments, stdin=path.read_text())
    assert result.exit_code == 0, result.output
    return result.stdout


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def fails(result, exit_code, *parts):
    """One line and a hint on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == "", result.output
    for part in parts:
        assert str(part) in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


def is_usage(result, part):
    assert result.exit_code == 2 and part in result.output, result.output


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path
