"""Ways to orthonormalize a basis."""

import itertools

from benchmarks.tables.formats import markdown, read, table

METHODS = {
    "qr": "QR",
    "cholesky_qr2": "CholeskyQR, two rounds",
    "shifted_cholesky_qr3": "CholeskyQR, shifted, three rounds",
    "newton_schulz": "Newton-Schulz, 12 steps",
}


def seconds_over_qr(part: str) -> tuple[list[str], list[list[str]]]:
    """A device's seconds over those of QR: the shapes, and a row for each method."""
    rows = read("orthonormalize.json")[part]["rows"]
    header = [f"{row['stack']} of {row['size']}²" for row in rows]
    return header, [[f"{row['seconds_over_qr'][name]:.2f}" for row in rows] for name in METHODS]


@table
def orthonormalize() -> str:
    """Errors and seconds of the ways to orthonormalize a basis."""
    file = read("orthonormalize.json")
    middle = next(row for row in file["cpu"]["rows"] if row["size"] == 256)
    kinds = ("2 decades", "6 decades", "singular, no shift")
    cpu_header, cpu = seconds_over_qr("cpu")
    gpu_header, gpu = seconds_over_qr("gpu")
    rows = []
    for (name, shown), *seconds in zip(METHODS.items(), cpu, gpu, strict=True):
        errors = (middle["errors"][name][kind] for kind in kinds)
        shown_errors = ("not finite" if error is None else f"{error:.0e}" for error in errors)
        rows.append([shown, *shown_errors, *itertools.chain(*seconds)])
    header = ["", *(f"error, {kind}" for kind in kinds), *(f"CPU, {shape}" for shape in cpu_header)]
    return markdown([*header, *(f"GPU, {shape}" for shape in gpu_header)], rows)


@table
def orthonormalize_counts() -> str:
    """FLOPs and compilations of the ways to orthonormalize a basis."""
    file = read("orthonormalize.json")
    tpu = file["tpu"]["rows"]
    rows = [
        [
            shown,
            f"{file['flops_over_cube'][name]:.1f}",
            *(f"{row['methods'][name]['xla_flops_over_cube']:.1f}" for row in tpu),
            *(f"{row['methods'][name]['compile_seconds']:.0f}" for row in tpu),
        ]
        for name, shown in METHODS.items()
    ]
    shapes = [f"{row['stack']} of {row['size']}²" for row in tpu]
    header = ["", "FLOPs", *(f"XLA's FLOPs, {shape}" for shape in shapes)]
    return markdown([*header, *(f"compilation, {shape}" for shape in shapes)], rows)
