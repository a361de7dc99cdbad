"""Images: classes, pixels and captions of digits."""

import functools

from benchmarks.tables.formats import NAMES, TABLES, losses, markdown, mean, read


def images(file: str, task: str) -> str:
    """Test losses of a task by seed."""
    rows = []
    for name, row in read(file)["results"][task].items():
        tested = [run["test"]["loss"] for run in row["runs"]]
        rows.append([NAMES[name], losses(tested), f"{mean(tested):.3f}"])
    return markdown(["", "test loss by seed", "mean"], rows)


TABLES |= {
    "digits": functools.partial(images, "vision.json", "classes"),
    "pixels": functools.partial(images, "vision.json", "pixels"),
    "captions": functools.partial(images, "contrastive.json", "captions"),
}
