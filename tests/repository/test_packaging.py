"""What the package promises as a package: names, types, versions, and what it imports."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sophia_optax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sophia_optax"
OPTIONAL = {"nnx", "linen", "plotting"}
MODULES = sorted(PACKAGE.glob("*.py"))
CORE = [path for path in MODULES if path.stem not in OPTIONAL]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# They change parts of the algorithm, which no public name does.
ABLATIONS = {"rare_rows.py", "warmup.py"}

PUBLIC_NAMES = {
    "PAPER",
    "Coordinates",
    "InEigenbasisState",
    "MatrixAxes",
    "in_eigenbasis",
    "HessianFn",
    "Likelihood",
    "ScaleBySophiaState",
    "SophiaDiagnostics",
    "bernoulli",
    "categorical",
    "curvature_batch",
    "diagnostics",
    "gauss_newton_bartlett",
    "gaussian",
    "hutchinson",
    "on_emit",
    "scale_by_sophia",
    "sophia_g",
    "sophia_h",
    "win_rate_target",
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def test_the_public_names_are_those_of_the_contract() -> None:
    exported = {
        alias.asname
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported == PUBLIC_NAMES
    assert all(hasattr(sophia_optax, name) for name in PUBLIC_NAMES)


# A mapping has no docstring of its own; the one below it is in docs/api.md.
@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"PAPER"}))
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(sophia_optax, name).__doc__


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_versions_agree() -> None:
    assert "version" in PROJECT["dynamic"], "the version is that of sophia_optax/__init__.py"
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    headings = r"^## \[(\d\S+)\] - \d{4}-\d\d-\d\d$"
    released = re.findall(headings, (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sophia_optax.__version__ == cited == released[0]


def test_the_dependencies_are_three() -> None:
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names == {"jax", "optax", "jaxtyping"}


def test_extras_are_those_that_the_readme_and_contributors_use() -> None:
    assert {"test", "examples", "plotting", "notebooks", "docs", "tpu", "dev"} <= set(EXTRAS)
    assert "sophia_optax[examples]" in EXTRAS["test"]


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "tests"])
def test_what_is_imported_is_declared(folder: str) -> None:
    requirements = PROJECT["dependencies"] + EXTRAS["examples"]
    if folder == "tests":
        requirements += EXTRAS["test"]
    declared = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    modules = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
    declared = {modules.get(name, name) for name in declared}
    ours = {"sophia_optax", "benchmarks", "examples", "tests"}
    for path in (ROOT / folder).rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path)}
        assert found <= declared | ours | set(sys.stdlib_module_names), path


@pytest.mark.parametrize("requirement", PROJECT["dependencies"] + EXTRAS["examples"])
def test_direct_dependencies_have_a_permissive_license(requirement: str) -> None:
    declared = importlib.metadata.metadata(re.match(r"[\w-]+", requirement)[0])
    # Some state the whole text, with those of what is bundled.
    stated = [declared.get("License-Expression"), (declared.get("License") or "")[:80]]
    stated += declared.get_all("Classifier") or []
    text = " ".join(line for line in stated if line)
    assert re.search(r"Apache|\bMIT\b|\bBSD\b|Python Software Foundation", text)
    assert not re.search(r"\b[AL]?GPL", text)


@pytest.mark.parametrize("folder", ["sophia_optax", "examples"])
def test_nothing_is_unpickled_or_evaluated_and_nothing_imported_that_fetches(folder: str) -> None:
    modules = {"pickle", "marshal", "shelve", "urllib", "http", "ftplib", "requests"}
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & modules, path
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path
        assert "allow_pickle" not in path.read_text(), path


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_imports_jax_optax_jaxtyping_and_nothing_else(path: Path) -> None:
    allowed = {"jax", "optax", "jaxtyping", "sophia_optax", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_imports_the_package_that_imports_it(path: Path) -> None:
    if path.stem != "__init__":
        assert not imports(path) & {f"sophia_optax.{name}" for name in PUBLIC_NAMES}
        assert "sophia_optax" not in imports(path)


def test_nothing_imports_private_modules_of_jax_optax_or_flax() -> None:
    folders = ("sophia_optax", "tests", "examples", "benchmarks", "notebooks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for name in imports(path):
            package, *inner = name.split(".")
            if package in {"jax", "jaxlib", "optax", "flax", "orbax", "grain"}:
                assert not any(part.startswith("_") for part in inner), f"{path}: {name}"


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "notebooks"])
def test_what_users_copy_imports_public_names_alone(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            if name.startswith("sophia_optax.") and path.name not in ABLATIONS:
                assert not name.split(".")[1].startswith("_"), f"{path}: {name}"


def test_importing_the_library_imports_neither_flax_nor_matplotlib() -> None:
    code = "import sys, sophia_optax; sys.exit(bool({'flax', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
