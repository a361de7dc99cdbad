"""The eigenbasis with one part changed."""

from benchmarks.tables.formats import NAMES, losses, markdown, mean, mean_or_diverged, read, table

ABLATIONS = {
    "f = 10": "basis refreshed at every 10th step",
    "f = 100": "basis refreshed at every 100th step",
    "blocks of 128": "blocks of 128",
    "blocks of 64": "blocks of 64",
    "blocks of 32": "blocks of 32",
    "basis from samples": "basis from the sampled gradients of the curvature",
    "inputs only": "matrices turned on the side of their inputs only",
    "outputs only": "matrices turned on the side of their outputs only",
    "embeddings not turned": "embeddings not turned",
    "no Nesterov": "no Nesterov momentum",
    "no curvature": "no curvature: the sign of each turned coordinate",
    "no clip": "no clip",
}


@table
def ablations() -> str:
    """The losses of Sophia-G in the eigenbasis with one thing changed."""
    file = read("ablations.json")
    rows = [["as raced", "1", losses(file["raced"]), None]]
    for name, shown in ABLATIONS.items():
        for factor, found in file["results"]["changes"].get(name, {}).items():
            if None in found.values():
                rows.append([shown, factor, "diverged", None])
                continue
            worse = mean(loss - file["raced"][int(seed)] for seed, loss in found.items())
            rows.append([shown, factor, losses(found.values()), f"{worse:+.3f}"])
    return markdown(["", "learning rate", "loss by seed", "change"], rows)


@table
def ablation_rates() -> str:
    """Losses by the learning rate over the tuned one."""
    rates = read("ablations.json")["results"]["rates"]
    factors = list(rates["adamw"])
    rows = [
        [NAMES[name], *(mean_or_diverged(found[factor].values()) for factor in factors)]
        for name, found in rates.items()
    ]
    return markdown(["learning rate over the tuned one", *factors], rows)
