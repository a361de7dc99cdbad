"""Numbers on the command lines of the small examples."""

import argparse
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """A type for `argparse`: whole numbers from `least` on that fit JAX's integers."""

    def number(text: str) -> int:
        found = int(text)
        if not least <= found < 2**31:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {2**31 - 1}")
        return found

    return number
