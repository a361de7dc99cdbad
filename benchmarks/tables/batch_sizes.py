"""Losses by the tokens of a step."""

from benchmarks.tables.formats import NAMES, losses, markdown, mean, mean_or_diverged, read, table


@table
def batch_sizes() -> str:
    """Losses of each optimizer by the tokens of a step, each with its tuned learning rate."""
    file = read("batch_sizes.json")
    batches = list(file["results"]["adamw"])
    rows = []
    for name, found in file["results"].items():
        cells: list[str | None] = []
        for batch in batches:
            row = found.get(batch)
            cells += [mean_or_diverged(row["losses"]), f"{row['learning_rate']:g}"] if row else [
                None, None
            ]  # fmt: skip
        rows.append([NAMES[name], *cells])
    header = [
        cell for batch in batches for cell in (f"{int(batch) * file['context']:,} tokens", "rate")
    ]
    return markdown(["", *header], rows)


CURVATURES = {
    "whole batch": "the whole batch in each estimate",
    "each step": "an estimate in each step",
    "whole batch, each step": "the whole batch in each step",
}


@table
def curvature_parts() -> str:
    """The losses of Sophia-G in the eigenbasis by what its curvature sees, and of SOAP."""
    file = read("batch_sizes.json")
    rows: list[list[str | None]] = []
    for batch in file["curvatures"]["whole batch"]:
        tokens = f"{int(batch) * file['context']:,}"
        own = file["results"]["sophia_g_eigenbasis"][batch]["losses"]
        rows.append([tokens, "as above", losses(own), None])
        others = {
            **{shown: file["curvatures"][name].get(batch) for name, shown in CURVATURES.items()},
            "SOAP": file["results"]["soap"][batch],
        }
        for shown, found in others.items():
            if found:
                more = mean(a - b for a, b in zip(found["losses"], own, strict=True))
                rows.append([tokens, shown, losses(found["losses"]), f"{more:+.3f}"])
    return markdown(["tokens", "curvature", "loss by seed", "change"], rows)
