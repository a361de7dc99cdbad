"""A benchmark's command line: flags are parsed before anything runs."""

from pathlib import Path

import pytest

import benchmarks

SCRIPTS = [
    path
    for path in sorted(Path(benchmarks.__path__[0]).glob("[a-z]*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_parser_takes_the_flags_so_that_help_starts_no_run(script: Path) -> None:
    source = script.read_text()
    assert "sys.argv" not in source
    assert "tyro.cli(" in source or "ArgumentParser(" in source
