"""Fixed γ and targets over models and batches."""

from benchmarks.tables.formats import markdown, mean, read, table


@table
def targets() -> str:
    """The best fixed γ of each model and batch, and targets over it."""
    file = read("self_tuning_gamma_sophia_g.json")
    kinds = [name for name in file["cells"][0] if name.startswith("target ")]
    rows = []
    for cell in sorted(file["cells"], key=lambda cell: (cell["width"], cell["batch"])):
        best = cell["best gamma"]
        ratios = (f"{cell[kind]['over_best']:.3f}" for kind in kinds)
        name = f"{cell['width']}, {cell['batch']}"
        rows.append([name, f"{best['gamma']:.3g}", f"{mean(best['losses']):.3f}", *ratios])
    names = [kind.removeprefix("target ") for kind in kinds]
    return markdown(["width, sequences", "best γ", "its loss", *names], rows)
