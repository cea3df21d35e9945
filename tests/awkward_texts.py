"""Texts that tokenizers differ on: the same for the same seed, on every Python."""

import random

_WORDS = (
    "the man pours tea into a CUP and isn't there; She'll say it's Ours they'VE 'd we’re'm".split()
)
_LITERALS = (
    "</s> <s> <pad> <unk> <mask> <|endoftext|> madeupword0000 <|pad|> Ġ Ċ ▁ #version:".split()
)
_EMOJI = "☕ 😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇳🇱 🇺🇳 1️⃣ ❤️ 🧑🏿 👁️‍🗨️ ☠ 🫖".split()
_SCRIPTS = (  # first and last code point
    (0x4E00, 0x9FA5),  # CJK
    (0x3041, 0x30FA),  # kana
    (0xAC00, 0xD7A3),  # hangul
    (0x0621, 0x064A),  # Arabic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0905, 0x0939),  # Devanagari
    (0x0E01, 0x0E30),  # Thai
    (0x0410, 0x044F),  # Cyrillic
    (0x0391, 0x03C9),  # Greek
    (0x00C0, 0x024F),  # Latin with marks
    (0x10330, 0x1034A),  # Gothic, beyond the BMP
    (0x20000, 0x20100),  # CJK, beyond the BMP
)
_SPACES = " \t\n\r\x0b\x0c\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000"
_UNSEEN = "\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f\u202e\ufffd\ufffe\U000e0041"
_DIGITS = "0123456789٣४５Ⅷ½²௧〇"
_MARKS = (0x0300, 0x036F)


class _Writer:
    """Pieces of text; all that is random comes from random(), which no release has changed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def number(self, first: int, last: int) -> int:
        return first + int(self._random() * (last - first + 1))

    def one_of(self, items):
        return items[self.number(0, len(items) - 1)]

    def run(self, first: int, last: int, item) -> str:
        return "".join(item() for _ in range(self.number(first, last)))

    def script(self) -> str:
        low, high = self.one_of(_SCRIPTS)
        return self.run(1, 6, lambda: chr(self.number(low, high)))

    def mark(self) -> str:
        return chr(self.number(*_MARKS))

    def any_character(self) -> str:
        code = self.number(0, 0x1FFFF)
        return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)

    def control(self) -> str:
        return chr(self.one_of([self.number(0, 31), self.number(127, 159)]))

    def letter(self) -> str:
        return chr(self.number(ord("a"), ord("z")))

    def piece(self) -> str:
        kind = self.number(0, 99)
        if kind < 40:
            return self.one_of([" ", " ", ""]) + self.one_of(_WORDS)
        if kind < 50:
            return self.script()
        if kind < 58:
            return self.run(1, 3, lambda: self.one_of(_EMOJI))
        if kind < 64:
            return self.one_of([" ", "\n", self.one_of(_SPACES)]) * self.number(1, 40)
        if kind < 70:
            return self.run(1, 6, lambda: self.one_of(_SPACES))
        if kind < 75:
            return self.run(1, 9, lambda: self.one_of(_DIGITS))
        if kind < 80:
            return self.run(1, 5, lambda: self.one_of("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~…—«»"))
        if kind < 84:
            return self.run(1, 3, self.control)
        if kind < 88:
            return self.run(0, 1, self.letter) + self.run(1, 3, self.mark)
        if kind < 92:
            return self.run(1, 2, lambda: self.one_of(_UNSEEN)) + self.run(0, 3, self.letter)
        if kind < 95:
            return self.one_of(_LITERALS)
        if kind < 98:
            return self.run(1, 3, self.any_character)
        return self.one_of([self.run(50, 150, self.letter), self.letter() * self.number(50, 400)])


def awkward_texts(count: int, seed: int) -> list[str]:
    """`count` texts of up to 7 pieces; the first few are the shortest that go wrong."""
    writer = _Writer(seed)
    first = ["", " ", "  ", "\n", "a", " a", "a ", "\u0301", "\u200d", "'s", "A photo of a cat"]
    texts = first + [writer.run(1, 7, writer.piece) for _ in range(count)]
    return texts[:count]
