"""A machine for the few pickle opcodes that a file of tensors needs; it runs nothing.

Python's unpickler calls whatever the file names. This one only recognises names: a global becomes a
`Global`, and only the functions of the caller's table are ever called, with plain values. Opcodes
are decoded by `pickletools.genops`, which reads and never executes.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class UnsafePickle(Exception):
    """The pickle asks for something that a file of tensors has no need of."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, `module.attribute`; not the thing itself."""

    name: str


class Instance(dict):
    """What a class of the table made, where the pickle may set attributes: they are dropped."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_GET = frozenset(("BINGET", "LONG_BINGET"))
_PUT = frozenset(("BINPUT", "LONG_BINPUT"))
_SET = frozenset(("SETITEM", "SETITEMS"))
_APPEND = frozenset(("APPEND", "APPENDS"))


def load(
    data: bytes,
    functions: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object that the pickle describes.

    Args:
        functions: what the pickle may call, by the name it calls it. Another global may be
            mentioned (as a storage's type, say) but not called.
        persistent: makes an object of a persistent id.

    Raises:
        UnsafePickle: naming the global or opcode that is refused, or saying what is malformed.
    """
    machine = _Machine(functions, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except UnsafePickle:
        raise
    except Exception as error:  # genops and a malformed stack raise a dozen kinds
        raise UnsafePickle(f"is malformed: {error!r}") from error
    raise UnsafePickle("is malformed: has no end")


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], persistent):
        self.functions = functions
        self.persistent = persistent
        self.stack: list[Any] = []  # since the last mark
        self.marked: list[list[Any]] = []  # what lies below each mark
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name == "TUPLE":
            items = self.pop_to_mark()
            self.stack.append(tuple(items))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in _GET:
            stack.append(self.memo[argument])
        elif name in _PUT:
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _SET:
            self.set_items([self.pop(), self.pop()][::-1] if name == "SETITEM" else None)
        elif name in _APPEND:
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            self.container(list).extend(items)
        elif name == "GLOBAL":
            stack.append(Global(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise UnsafePickle("is malformed: has a global whose name is no text")
            stack.append(Global(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(self.persistent(self.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            self.reduce()
        elif name == "INST":
            raise UnsafePickle(f"asks to call {argument.replace(' ', '.', 1)}")
        elif name == "BUILD":
            self.pop()
            self.container(Instance)
        else:
            raise UnsafePickle(f"opcode {name} is refused")

    def container(self, kind: type) -> Any:
        """What is on top of the stack, which must be one of these."""
        # no repr of what a pickle made: a small one can describe an endless text
        if not isinstance(self.stack[-1], kind):
            found = type(self.stack[-1]).__name__
            raise UnsafePickle(f"asks to change a {found} as if it were a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, items: list[Any] | None) -> None:
        items = self.pop_to_mark() if items is None else items
        if len(items) % 2:
            raise UnsafePickle("is malformed: has a key without a value")
        target = self.container(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):  # the hash of nested tuples can take for ever
                raise UnsafePickle(f"has a {type(key).__name__} as a key")
            target[key] = value

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        name = getattr(function, "name", f"a {type(function).__name__}")
        if not isinstance(function, Global) or name not in self.functions:
            raise UnsafePickle(f"asks to call {name}")
        if not isinstance(arguments, tuple):
            raise UnsafePickle(f"is malformed: the arguments of {name} are no tuple")
        self.stack.append(self.functions[name](*arguments))
