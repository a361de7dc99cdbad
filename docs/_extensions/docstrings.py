"""Docstrings as the site shows them: an "Example:" is a section with code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the heading to the plural, the only one that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that was read."""
        del kwargs
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)
