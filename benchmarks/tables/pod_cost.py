"""A step on TPU pods."""

from typing import Any

from benchmarks.tables.formats import NAMES, markdown, read, table


def pods(key: str, **chosen: Any) -> list[dict[str, Any]]:
    """The rows of a list of `pod_cost.json` with these settings."""
    rows = read("pod_cost.json")[key]
    return [row for row in rows if all(row[name] == value for name, value in chosen.items())]


@table
def pod_ratios() -> str:
    """FLOPs and memory on sixteen chips."""
    found = [row for row in pods("over_adamw", topology="v5e:4x4") if row["model"] == "gpt2-124m"]
    rows = [
        [
            NAMES[row["optimizer"]],
            f"{row['batch_per_chip']} in {row['accumulate']}",
            f"{row['flops_average_over_adamw']:.3f}",
            *(f"{row[f'{kind}_bytes_over_adamw']:.3f}" for kind in ("temp", "peak")),
            "yes" if row["fits"] else "no",
        ]
        for row in found
    ]
    columns = ["sequences a chip, microbatches", "FLOPs", "temporary memory", "peak memory", "fits"]
    return markdown(["", *columns], rows)


@table
def pod_eigenbasis() -> str:
    """What the eigenbasis costs on sixteen chips, over AdamW."""
    columns = {
        "FLOPs, f = 10": "flops_average",
        "FLOPs, f = 1": "flops_basis_in_each_step",
        "state": "state_bytes",
        "peak memory": "peak_bytes",
        "bytes moved": "moved_bytes",
        "compilation": "compile_seconds",
    }
    found = [
        row
        for name in ("sophia_g", "sophia_g_eigenbasis", "soap")
        for row in pods("over_adamw", topology="v5e:4x4", optimizer=name)
    ]
    rows = []
    for row in found:
        ratios = (row.get(f"{key}_over_adamw") for key in columns.values())
        cells = ("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        rows.append([NAMES[row["optimizer"]], *cells])
    return markdown(["", *columns], rows)


@table
def pod_scale() -> str:
    """What a chip does and holds on pods of several sizes."""
    topologies = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
    rows = []
    for what, key, unit in (
        ("TFLOP an average step", "flops_average", 1e12),
        ("GB at the peak", "peak_bytes", 1e9),
    ):
        for name in ("adamw", "sophia_g"):
            cells = []
            for topology in topologies:
                chosen = {"optimizer": name, "topology": topology, "batch_per_chip": 16}
                (plan,) = pods("plans", model="gpt2-124m", **chosen)
                cells.append(f"{plan[key] / unit:.3f}")
            rows.append([f"{NAMES[name]}, {what}", *cells])
    return markdown(["", *(f"`{topology}`" for topology in topologies)], rows)
