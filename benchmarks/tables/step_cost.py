"""FLOPs, memory and seconds of a step."""

from benchmarks.tables.formats import NAMES, markdown, read, table

SIZES = {"1m": "1M", "11m": "11M", "gpt2-124m": "124M", "gpt2-1.5b": "1.5B"}


@table
def step_flops() -> str:
    """FLOPs of the average step by model."""
    found = read("step_cost.json")["over_adamw"]
    names = ("sophia_g", "sophia_h", "contrib_sophia", "lion", "muon")
    rows = [
        [shown, *(f"{found[f'flops/{size}/{name}']['flops_average']:.3f}" for name in names)]
        for size, shown in SIZES.items()
    ]
    return markdown(["parameters", *(NAMES[name] for name in names)], rows)


@table
def step_flops_in_the_eigenbasis() -> str:
    """FLOPs of the average step in the eigenbasis by model and by the interval of the bases."""
    found = read("step_cost.json")["over_adamw"]
    columns = {
        f"{NAMES[name]}, {shown}": (name, key)
        for name in ("sophia_g_eigenbasis", "soap")
        for shown, key in {
            "f = 10": "flops_average",
            "f = 1": "flops_average_basis_in_each_step",
        }.items()
    }
    rows = [
        [shown, *(f"{found[f'flops/{size}/{name}'][key]:.3f}" for name, key in columns.values())]
        for size, shown in SIZES.items()
    ]
    return markdown(["parameters", *columns], rows)


@table
def step_seconds_by_width() -> str:
    """Seconds of the train step in the eigenbasis by width."""
    found = read("step_cost.json")["over_adamw"]
    keys = [key for key in found if "/width-" in key]
    names = ("sophia_g", "sophia_g_eigenbasis", "soap")
    rows = [[NAMES[name], *(f"{found[key][name]:.2f}" for key in keys)] for name in names]
    widths = [f"width {key.rpartition('-')[2]}" for key in keys]
    return markdown(["", *widths], rows)


@table
def step_flops_by_interval() -> str:
    """FLOPs of the average step by `update_interval`."""
    found = read("step_cost.json")["over_adamw"]
    names = ("sophia_g", "sophia_h", "contrib_sophia")
    intervals = list(found[f"interval/gpt2-1.5b/{names[0]}"])
    rows = [
        [NAMES[name], *(f"{found[f'interval/gpt2-1.5b/{name}'][k]:.3f}" for k in intervals)]
        for name in names
    ]
    return markdown(["", *(f"k = {k}" for k in intervals)], rows)


@table
def step_flops_by_share() -> str:
    """FLOPs of the average step by the part of the batch that an estimate sees."""
    found = read("step_cost.json")["over_adamw"]
    shares = (1, 2, 4, 8, 16)
    rows = [
        [NAMES[name], *(f"{found[f'share/11m/{share}/{name}']:.3f}" for share in shares)]
        for name in ("sophia_g", "sophia_h")
    ]
    return markdown(["", "all", *(f"1/{share}" for share in shares[1:])], rows)


@table
def update_cost() -> str:
    """The update off a refresh, for a TPU and a CPU."""
    found = read("step_cost.json")["runs"]
    rows = []
    for name in ("adamw", "lion", "sophia_g", "sophia_h", "contrib_sophia", "muon"):
        tpu, cpu = (found[f"update/{device}/gpt2-1.5b/{name}"] for device in ("tpu", "cpu"))
        counts = (f"{tpu['passes']:.1f}", f"{cpu['passes']:.1f}", f"{cpu['temporaries']:.1f}")
        rows.append([NAMES[name], *counts, cpu["copies"]])
    return markdown(["", "passes, TPU", "passes, CPU", "temporaries, CPU", "copies, CPU"], rows)


@table
def step_seconds() -> str:
    """Seconds of the update and of the train step."""
    found = read("step_cost.json")["over_adamw"]
    timings = ("update/cpu/1m", "update/cpu/11m", "step/cpu/1m")
    rows = [
        [NAMES[name], *(f"{found[f'seconds/{timing}'][name]:.2f}" for timing in timings)]
        for name in ("sophia_g", "sophia_h", "contrib_sophia", "lion", "muon")
    ]
    return markdown(["", "update, 1M", "update, 11M", "train step, 1M"], rows)
