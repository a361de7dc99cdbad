"""Warm-up, learning rates and changes to the algorithm."""

from benchmarks.tables.formats import losses, markdown, percent, read, table

CHANGES = {
    "as it is": "the paper's",
    "|h| where negative": r"\|h\|",
    "tensor's mean where negative": r"the tensor's mean of \|h\| where negative",
    "floor: tensor's mean / 10": "at least a tenth of that mean",
    "root of the mean square": "the root of the mean square of the estimates",
    "no step where negative": "no step where negative",
    "Nesterov": "Nesterov's m",
    "clip grows over 100 steps": "the clip grows over 100 steps",
    "m corrected": "m divided by 1 - b1^t",
    "4 probes": "4 probes",
    "estimates in each of 20 steps": "an estimate in each of the first 20 steps",
    "|h|, k = 50 in the second half": r"\|h\|, k = 50 in the second half",
    "|h|, b1 rises to 0.9": r"\|h\|, b1 rises to 0.9 over the run",
    "|h|, gradients not clipped": r"\|h\|, gradients not clipped",
}

WARMUPS = (0.02, 0.2)


@table
def warmup_rates() -> str:
    """Losses of three seeds by learning rate and warm-up, for the paper's h and for |h|."""
    found = read("warmup.json")["results"]["instead"]["sophia_h_paper"]
    rates = (0.003, 0.004, 0.006, 0.008)
    rows = [
        [
            f"{CHANGES[name]}, warm-up {percent(warmup)}",
            *(losses(found[name][f"warmup {warmup}, learning_rate {rate}"]) for rate in rates),
        ]
        for name in ("as it is", "|h| where negative")
        for warmup in WARMUPS
    ]
    return markdown(["learning rate", *map(str, rates)], rows)


@table
def warmup_changes() -> str:
    """The first seed's losses of each change to the algorithm."""
    found = read("warmup.json")["results"]["instead"]["sophia_h_paper"]
    rates = (0.003, 0.004, 0.006)
    rows = [
        [
            CHANGES.get(name, name.replace("|", r"\|")),
            *(
                f"{found[name][f'warmup {warmup}, learning_rate {rate}'][0]:.3f}"
                for warmup in WARMUPS
                for rate in rates
            ),
        ]
        for name in found
    ]
    header = ["", *(f"{percent(warmup)}: {rate}" for warmup in WARMUPS for rate in rates)]
    return markdown(header, rows)
