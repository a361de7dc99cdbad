"""The estimators against exact diagonals."""

from typing import Any

from benchmarks.tables.formats import markdown, percent, read, table

TARGETS = {
    "Hutchinson, signs": "hessian",
    "Hutchinson, normal": "hessian",
    "GNB, labels": "gauss_newton",
    "GNB, curvature propagation": "gauss_newton",
}


def quality(estimator: str, **chosen: Any) -> dict[str, Any]:
    """The one row of an estimator against its own diagonal with these settings."""
    wanted = {"data": "reference", "share": 1, "probes": 1, "refreshes": 100} | chosen
    wanted |= {"estimator": estimator, "target": TARGETS[estimator]}
    (row,) = (
        row
        for row in read("estimator_quality.json")["rows"]
        if all(row[key] == value for key, value in wanted.items())
    )
    return row


def wrong(row: dict[str, Any], kind: str = "all") -> str:
    """The share of coordinates that are clipped under one diagonal alone."""
    return percent(row["errors"][kind]["flips"], 1)


@table
def estimator_errors() -> str:
    """Wrong verdicts by refreshes and by the part of the batch."""
    rows = [
        [
            name,
            f"{quality(name)['cost']:.2f}",
            *(wrong(quality(name, refreshes=refreshes)) for refreshes in (1, 10, 100)),
            wrong(quality(name, share=8)),
            f"{quality(name, share=8)['cost']:.2f}",
            wrong(quality(name, probes=16, refreshes=1)),
        ]
        for name in TARGETS
    ]
    header = ["", "cost of a refresh", "1 refresh", "10 refreshes", "100 refreshes"]
    return markdown([*header, "100, on an eighth", "cost on an eighth", "1 of 16 probes"], rows)


@table
def estimator_errors_by_kind() -> str:
    """Wrong verdicts of each kind of parameter, and how the two exact diagonals differ."""
    names = ("Hutchinson, signs", "GNB, labels", "GNB, curvature propagation")
    exact = read("estimator_quality.json")["hessian_and_gauss_newton"]
    rows = [
        [
            kind,
            *(wrong(quality(name), kind) for name in names),
            percent(exact[kind]["flips"], 1),
            percent(exact[kind]["negative"], 1),
        ]
        for kind in [*(kind for kind in exact if kind != "all"), "all"]
    ]
    return markdown(["", *names, "the two diagonals", "Hessian below zero"], rows)


@table
def estimator_errors_in_a_run() -> str:
    """Wrong verdicts of one average on other batches, and along a run."""
    rows = [
        [name, *(wrong(quality(name, data=data, share=2)) for data in ("reference", "next", "run"))]
        for name in ("Hutchinson, signs", "GNB, labels", "GNB, curvature propagation")
    ]
    return markdown(["", "reference batch", "next batches", "the run's"], rows)
