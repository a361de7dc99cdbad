"""The run-time type checker that the tests put on the library's annotations."""

from collections.abc import Callable
from typing import Any

import beartype

# As PEP 484 has it, an int is welcome where the annotation says float.
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_checks: dict[Any, Callable[..., Any]] = {}


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype's check of a signature, made once for all closures that one `def` defines.

    It gets no function of the library from jaxtyping, but one with the same signature and no body.
    """
    annotations = tuple(function.__annotations__.items())
    defaults = len(function.__defaults__ or ()), frozenset(function.__kwdefaults__ or ())
    key = function.__module__, function.__qualname__, function.__code__, annotations, defaults
    try:
        check = _checks.get(key)
    except TypeError:  # an annotation cannot be hashed
        return _beartype(function)
    if check is None:
        check = _checks[key] = _beartype(function)
    return check
