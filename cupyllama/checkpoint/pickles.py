"""A machine for the few pickle opcodes that a file of tensors needs; it runs nothing.

Python's unpickler calls whatever the file names. This one only recognises names: a global becomes a
`Global`, and only the functions of the caller's table are ever called, with plain values. What else
a file has of objects, a training run's settings, say, can be read as `Instance`s, of which nothing
is imported or made. Opcodes are decoded by `pickletools.genops`, which reads and never executes.
"""

import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING  # names as pickles before protocol 3 have them
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_LONGEST_MESSAGE = 300


class UnsafePickle(Exception):
    """The pickle asks for something that a file of tensors has no need of."""

    def __init__(self, what: str):
        # what is malformed may be shown, and may be all of the pickle
        super().__init__(what[:_LONGEST_MESSAGE] + "…" * (len(what) > _LONGEST_MESSAGE))


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, `module.attribute`; not the thing itself."""

    name: str


class Instance(dict):
    """What stands for an object: what the pickle says of it, and its items if it is a mapping."""

    def __init__(self, name: str = "", arguments: tuple = ()):
        super().__init__()
        self.name = name  # of what would be called to make it
        self.arguments = arguments
        self.state: Any = None  # that it would be given then


# Of the standard library, what holds settings. Nothing is ever called, so this guards no one: it
# tells a file that is to be trusted from one that tries something.
_MODULES_OF_VALUES = frozenset(
    "argparse collections copyreg datetime decimal enum fractions pathlib typing uuid".split()
)
_VALUES_ELSEWHERE = frozenset(
    """
    builtins.bool builtins.bytearray builtins.bytes builtins.complex builtins.dict builtins.float
    builtins.frozenset builtins.getattr builtins.int builtins.list builtins.object builtins.range
    builtins.set builtins.slice builtins.str builtins.tuple builtins.type types.SimpleNamespace
    _codecs.encode operator.getitem re._compile
    """.split()
)


def holds_settings(name: str) -> bool:
    """Whether a file of settings may have objects of this make: all but what runs code."""
    package, _, rest = name.partition(".")
    package = IMPORT_MAPPING.get(package, package)
    if package not in sys.stdlib_module_names:
        return True
    return package in _MODULES_OF_VALUES or f"{package}.{rest}" in _VALUES_ELSEWHERE


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = frozenset(
    """
    BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8
    """.split()
)
_GET = frozenset(("BINGET", "LONG_BINGET"))
_PUT = frozenset(("BINPUT", "LONG_BINPUT"))
_SET = frozenset(("SETITEM", "SETITEMS"))
_APPEND = frozenset(("APPEND", "APPENDS"))


def load(
    data: bytes,
    functions: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
    inert: Callable[[str], bool] | None = None,
) -> Any:
    """The object that the pickle describes.

    Args:
        functions: what the pickle may call, by the name it calls it. Another global may be
            mentioned (as a storage's type, say) but not called.
        persistent: makes an object of a persistent id.
        inert: whether what the pickle asks to call by a name that is not in `functions` becomes
            an `Instance`. Items whose keys are neither text nor whole numbers are left out then.

    Raises:
        UnsafePickle: naming the global or opcode that is refused, or saying what is malformed.
    """
    machine = _Machine(functions, persistent, inert)
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

    def __init__(self, functions: Mapping[str, Callable[..., Any]], persistent, inert):
        self.functions = functions
        self.persistent = persistent
        self.inert = inert
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
            if not isinstance(self.stack[-1], Instance):  # of a deque, say, which is not read
                self.container(list).extend(items)
        elif name == "EMPTY_SET":
            stack.append(Instance("builtins.set"))
        elif name == "ADDITEMS":
            self.pop_to_mark()
            self.container(Instance)
        elif name == "FROZENSET":
            self.pop_to_mark()
            self.stack.append(Instance("builtins.frozenset"))
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
            state = self.pop()
            self.container(Instance).state = state
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
            if isinstance(key, (str, int)):  # the hash of nested tuples can take for ever
                target[key] = value
            elif self.inert is None:
                raise UnsafePickle(f"has a {type(key).__name__} as a key")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        name = getattr(function, "name", f"a {type(function).__name__}")
        known = isinstance(function, Global) and name in self.functions
        skipped = isinstance(function, Global) and self.inert is not None and self.inert(name)
        if not known and not skipped:
            raise UnsafePickle(f"asks to call {name}")
        if not isinstance(arguments, tuple):
            raise UnsafePickle(f"is malformed: the arguments of {name} are no tuple")
        made = self.functions[name](*arguments) if known else Instance(name, arguments)
        self.stack.append(made)
