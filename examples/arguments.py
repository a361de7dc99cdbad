"""The command line of the small examples."""

import argparse

from examples.lm.config import UsageError, check


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments. What the language model trainer would refuse, the parser refuses."""
    config = parser.parse_args()
    try:
        check(config)
    except UsageError as error:
        parser.error(str(error))
    return config
