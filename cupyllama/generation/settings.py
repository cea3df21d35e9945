"""How the next token is chosen."""

from dataclasses import dataclass

from cupyllama.errors import UsageError

# In the place of a token whose logits are NaN or infinite. It is fed once more before the host sees
# it: `gather` takes it for token 0.
NO_TOKEN = -1

# Rows hold them as float32, which has no room for a reciprocal much beyond.
_LEAST, _LARGEST = 1e-30, 1e30


@dataclass(frozen=True)
class SamplingSettings:
    """What HF's generate takes; by itself, always the most likely token.

    Raises:
        UsageError: a number is out of its range.
    """

    temperature: float = 0.0  # logits are divided by it; 0: the most likely token is taken
    top_k: int = 0  # only so many of the most likely tokens are drawn from; 0: all
    top_p: float = 1.0  # only as few of the most likely as are this likely together
    repetition_penalty: float = 1.0  # makes tokens of the prompt and the answer less likely
    seed: int = 0  # of the random numbers

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LEAST <= self.temperature <= _LARGEST:
            raise UsageError(
                f"temperature {self.temperature} is not 0 or a number from {_LEAST} to {_LARGEST}",
                "Give 0 for the most likely token, 1 for tokens as likely as the model has them.",
            )
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is negative", "Give 0 to draw from all tokens.")
        if not 0 <= self.top_p <= 1:
            raise UsageError(
                f"top-p {self.top_p} is not between 0 and 1", "Give 1 to draw from all tokens."
            )
        if not _LEAST <= self.repetition_penalty <= _LARGEST:
            raise UsageError(
                f"repetition penalty {self.repetition_penalty} is not a number from {_LEAST} to "
                f"{_LARGEST}",
                "Give 1 for none, more than 1 for fewer repetitions.",
            )
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(
                f"seed {self.seed} is not a number of 64 bits", "Give one from 0 to 2^64 - 1."
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0
