"""A session of `cupyllama generate` at a terminal: lines, their history and Ctrl-C."""

import fcntl
import os
import pty
import pwd
import select
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from generate_command import PROMPTS, SLOW, text_of


class Terminal:
    """A process at a terminal of its own; what is typed, and what is seen."""

    def __init__(self, command, environment):
        self.own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | environment,
            start_new_session=True,
            # the session's own terminal, so that its Ctrl-C is an interrupt
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        self.seen = ""
        os.write(self.own, text.encode())

    def wait_for(self, part, seconds=30):
        assert self.sees(part, seconds), f"no {part!r} in {self.seen!r}"

    def sees(self, part, seconds):
        """Whether it comes in that time."""
        end = time.monotonic() + seconds
        while part not in self.seen:
            ready, _, _ = select.select([self.own], [], [], max(0, end - time.monotonic()))
            if not ready:
                return False
            try:
                self.seen += os.read(self.own, 10_000).decode(errors="replace")
            except OSError:  # the other end is closed
                return part in self.seen
        return True

    def wait_for_sign(self):
        """Until a line is asked for: what is typed before is not for `input`, or Ctrl-D no end.

        The sign stands at the beginning of a line; readline, which draws a line again that is
        edited, goes back to its beginning and begins no other.
        """
        self.wait_for("\n> ")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.own)


@contextmanager
def session(tmp_path, *arguments, code=SLOW):
    command = [sys.executable, "-c", code, "generate", "--demo", "--device", "cpu", *arguments]
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "dumb"}
    terminal = Terminal(command, environment)
    try:
        terminal.wait_for("> ")
        yield terminal
    finally:
        terminal.close()


def test_a_session(tmp_path):
    whole = text_of("--prompt", PROMPTS[1], "--max-new-tokens", 8)
    with session(tmp_path, "--max-new-tokens", "8") as terminal:
        terminal.type(PROMPTS[1] + "\n")
        terminal.wait_for("tokens/s")
        assert whole in terminal.seen.replace("\r\n", "\n") and "8 tokens in" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("\n")  # nothing to answer
        terminal.wait_for_sign()
        terminal.type("the man " * 300 + "\n")
        terminal.wait_for("Shorten the prompt.")
        assert "this line: the prompt" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("xyz\x01\x0bShe pours\x0e\n")  # to the beginning, cut, and another text
        terminal.wait_for("tokens/s")
        terminal.wait_for_sign()
        terminal.type("\x10\x10\x10\n")  # three lines back in the history
        terminal.wait_for(whole[:5])
        terminal.wait_for("tokens/s")
        assert whole in terminal.seen.replace("\r\n", "\n")
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0
    history = (tmp_path / "state" / "cupyllama" / "history").read_text()
    assert history.splitlines()[0] == PROMPTS[1] and "She pours" in history
    with session(tmp_path, "--max-new-tokens", "2") as terminal:
        terminal.type("\x10")
        terminal.wait_for(PROMPTS[1])  # of the session before
        for _ in range(10):  # Python misses a signal while readline draws
            terminal.type("\x03")  # the line is given up, the session is not
            if terminal.sees("\n> ", 3):
                break
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


def test_a_session_says_what_it_has_room_for(tmp_path):
    code = SLOW.replace("cli()", "import cupyllama.generate\ncupyllama.generate.LINE_TOKENS = 64")
    with session(tmp_path, "--max-new-tokens", "8", code=code + "\ncli()") as terminal:
        terminal.type("the man " * 50 + "\n")
        terminal.wait_for("give it with --prompt: the model sees 512 tokens.")
        assert "it would pass the 64 that a session has room for" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("the man " * 300 + "\n")
        terminal.wait_for("Shorten the prompt.")
        assert "it would pass the model's 512" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


@pytest.mark.parametrize("beams", [[], ["--beam-width", "2"]])
def test_ctrl_c_ends_the_answer_and_not_the_session(tmp_path, beams):
    code = SLOW if not beams else SLOW.replace("step", "next_logits").replace("positions", "batch")
    whole = text_of("--prompt", PROMPTS[0])
    with session(tmp_path, *beams, code=code) as terminal:
        terminal.type(PROMPTS[0] + "\n")
        if beams:
            terminal.wait_for("\n")  # the line is taken
            time.sleep(0.5)
        else:
            terminal.wait_for(whole[:8])
        terminal.type("\x03")
        terminal.wait_for("tokens/s")
        assert "Traceback" not in terminal.seen and whole[-10:] not in terminal.seen
        terminal.wait_for_sign()
        terminal.type(PROMPTS[2] + "\n")  # the engine is as it was
        if not beams:
            terminal.wait_for(text_of("--prompt", PROMPTS[2], "--max-new-tokens", 8))
            terminal.type("\x03")
        terminal.wait_for("tokens/s")
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


def test_ctrl_c_ends_a_command_with_a_prompt(tmp_path):
    command = [sys.executable, "-c", SLOW, "generate", "--demo", "--device", "cpu", "--prompt"]
    terminal = Terminal([*command, PROMPTS[0]], {})
    try:
        terminal.wait_for(" and doors")
        terminal.type("\x03")
        terminal.wait_for("cupyllama: interrupted")
        assert terminal.process.wait(timeout=10) == 130 and "Traceback" not in terminal.seen
    finally:
        terminal.close()


def test_the_history_lies_where_the_system_wants_it(monkeypatch):
    from cupyllama.generation.console import history_path

    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    usual = Path("/home/somebody/.local/state/cupyllama/history")
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/cupyllama/history")


def test_a_session_of_somebody_without_a_home(monkeypatch, capsys):
    from cupyllama.generation.console import line_editing

    def no_such_user(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    with line_editing():
        pass
    assert capsys.readouterr() == ("", "")
