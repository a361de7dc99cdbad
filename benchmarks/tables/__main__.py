"""Writes the tables and figures of README and docs from the files of `benchmarks/results`.

python -m benchmarks.tables            rewrites what differs
python -m benchmarks.tables --check    names what differs, and exits with 1
"""

import argparse
import sys

from benchmarks.tables.formats import ROOT
from benchmarks.tables.pages import check, generated, pages


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page differs")
    arguments = parser.parse_args()
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
    if not arguments.check:
        for page, text in texts.items():
            texts[page] = generated(text)
            if texts[page] != text:
                (ROOT / page).write_text(texts[page])
                print(f"wrote {page}")
    found = check(texts)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
