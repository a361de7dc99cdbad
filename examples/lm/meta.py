"""nanoGPT's meta.pkl, the vocabulary of characters, read without unpickling it.

Unpickling runs what the file says. Here its opcodes are interpreted instead: those of dictionaries,
strings and whole numbers, which is all that nanoGPT writes, and nothing else.
"""

import pickletools
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from . import run_folder
from .config import UsageError

NAME = "meta.pkl"
LARGEST = 1 << 22  # bytes; a vocabulary of 65,536 characters takes 1.2 MB

IGNORED = {"PROTO", "FRAME"}
CONSTANTS = {"SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"}
MARK = object()


def read(path: Path) -> list[str]:
    """The characters, in the order of their tokens.

    Raises:
      UsageError: the file holds something else.
    """
    with run_folder.reading(path), path.open("rb") as file:
        content = file.read(LARGEST + 1)
    try:
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        found = interpret(content)
        itos = found["itos"]
        size = len(itos)
        characters = [itos[token] for token in range(size)]
        tokens = dict(zip(characters, range(size), strict=True))
        if not (are_characters(characters) and found["stoi"] == tokens):
            raise ValueError("itos and stoi are not a list of characters and its inverse")
        if found["vocab_size"] != size:
            raise ValueError(f"vocab_size is not the number of characters, {size}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{path} is not the vocabulary that nanoGPT writes ({reason}). Write vocab_size, itos "
            "and stoi of single characters, or remove the file for GPT-2's tokens."
        ) from error
    return characters


def are_characters(found: list[Any]) -> bool:
    """Whether these are different single characters, which can be written, at most 65,536."""
    single = all(
        isinstance(c, str) and len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in found
    )
    return single and 0 < len(found) == len(set(found)) <= 1 << 16


def interpret(content: bytes) -> dict[Any, Any]:
    """What a pickle of dictionaries, strings and whole numbers holds.

    Raises:
      ValueError: it holds something else, or is torn.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(content):
        name = opcode.name
        if name in CONSTANTS:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(MARK)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            start = len(stack) - 2
            if name == "SETITEMS":
                start = len(stack) - stack[::-1].index(MARK)
            items = stack[start:]
            del stack[start - (name == "SETITEMS") :]
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, Hashable):
                    raise ValueError("a key is a dictionary")
                stack[-1][key] = value
        elif name not in IGNORED | {"STOP"}:
            raise ValueError(f"it has the opcode {name} at byte {position}")
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise ValueError("it is not a dictionary")
    return stack[0]
