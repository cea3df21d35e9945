"""What a user can cause: one line that names the value, a hint with the remedy, an exit code."""


class CupyllamaError(Exception):
    """Base of all errors that end a command with one line instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class OutputError(CupyllamaError):
    """A result could not be written."""


class UsageError(CupyllamaError):
    """Options that contradict each other or the data."""

    exit_code = 2


class ModelError(CupyllamaError):
    """config.json, tokenizer or weights are missing, broken or not supported."""

    exit_code = 3


class NotFiniteError(ModelError):
    """The model made infinity or NaN where a number is wanted."""

    def __init__(self, message: str):
        super().__init__(
            message,
            "float16 may overflow: try --dtype bfloat16 or float32. If that does not help, the "
            "weights are broken.",
        )


class DataError(CupyllamaError):
    """The questions are missing or malformed."""

    exit_code = 4


class DeviceError(CupyllamaError):
    """No usable GPU, or not enough memory."""

    exit_code = 5


class RankError(CupyllamaError):
    """A process of several failed, and took the others with it."""

    exit_code = 6
