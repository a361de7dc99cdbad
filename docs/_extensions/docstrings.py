"""Docstrings as the site shows them: "Example:" becomes the section whose doctests are code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the heading to the plural, which is the only one that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that was read."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
