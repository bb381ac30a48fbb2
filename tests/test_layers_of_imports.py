"""Imports run downward only, and DGL is imported in few places. Read from the source, not run."""

import ast

import pytest
from helpers import ROOT

#: From the top of the house to its foundations. A module or package may import what stands in lower
#: rows, and itself; what stands in one row does not know its neighbours.
HOUSE = [
    {"__main__"},
    {"cli"},
    {"report", "explore"},
    {"comparison", "export", "tuning"},
    {"run"},
    {"checkpoint", "tracking"},
    {"training", "inference"},
    {"_average", "_objective", "_recorded"},
    {"batches", "optimizers"},
    {"evaluation"},
    {"_tiles"},
    {"model"},
    {"nn"},
    {"losses", "ops"},
    {"_factored"},
    {"pictures"},
    {"_machine"},
    {"settings"},
    {"encode"},
    {"io"},
    {"inspection"},
    {"datasets", "splits", "kg"},
    {"_dgl", "_labels", "_linked", "_tables", "answers"},
    {"_parquet"},
    {"_files", "_guards", "_kernels", "_owner", "_streams"},
    {"_gpu", "distributed"},
    {"_gradients"},
    {"errors", "_display", "_forms", "_graphbolt", "_version"},
]
HEIGHT = {name: -row for row, names in enumerate(HOUSE) for name in names}
#: Where the design allows DGL.
DGL_ALLOWED = {"kg", "nn", "io", "_dgl"}


def sources():
    """Name -> file of every module, under the names that they are imported by."""
    found = {}
    for package, folder in (
        ("imvia_graph", "imvia_graph"),
        ("imvia_graph.cli", "cli"),
        ("imvia_graph.datasets", "datasets"),
    ):
        top = ROOT / folder
        for path in sorted(top.rglob("*.py")):
            inner = path.relative_to(top).with_suffix("").parts
            # Scripts that lie beside data are no modules of the package.
            if folder == "datasets" and len(inner) > 1:
                continue
            parts = [part for part in inner if part != "__init__"]
            found[".".join([package, *parts])] = path
    return found


SOURCES = sources()
PACKAGES = {name for name, path in SOURCES.items() if path.name == "__init__.py"}


def home_of_public_names():
    """Name reachable from imvia_graph -> module that holds it, from imvia_graph/__init__.py."""
    tree = ast.parse(SOURCES["imvia_graph"].read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME":
            return ast.literal_eval(node.value)
    raise AssertionError("imvia_graph/__init__.py has no _HOME")


HOMES = home_of_public_names()


def imports(name):
    """(line, imported module) of every import in a module, those within functions too."""
    tree = ast.parse(SOURCES[name].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if name in PACKAGES else name.split(".")[:-1]
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base == "imvia_graph" and alias.name in HOMES:
                    yield node.lineno, f"imvia_graph.{HOMES[alias.name]}"
                elif inner in SOURCES:
                    yield node.lineno, inner
                else:
                    yield node.lineno, base


def room(name):
    """The module or package of the house that a module belongs to; None for imvia_graph itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


MODULES = [name for name in SOURCES if name != "imvia_graph"]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_its_place_in_the_house(name):
    assert room(name) in HEIGHT, f"say in HOUSE between which rows {room(name)} stands"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_below_it(name):
    wrong = []
    for line, target in imports(name):
        if target.split(".")[0] != "imvia_graph" or room(target) == room(name):
            continue
        if room(target) is None:
            # Only what needs no other module: the version, say.
            wrong.append(
                f"line {line}: imports the package itself; import the module that is meant"
            )
        elif HEIGHT.get(room(target), 0) >= HEIGHT.get(room(name), 0):
            wrong.append(f"line {line}: {target} does not stand below {room(name)}")
    assert wrong == []


@pytest.mark.parametrize("name", SOURCES)
def test_dgl_is_imported_only_where_the_design_says(name):
    if room(name) in DGL_ALLOWED:
        pytest.skip("may import DGL")
    wrong = [
        f"line {line}: {target}"
        for line, target in imports(name)
        if target.split(".")[0] == "dgl" or target == "imvia_graph._dgl"
    ]
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in SOURCES if room(name) != "_dgl"])
def test_dgl_is_imported_through_one_module(name):
    wrong = [f"line {line}" for line, target in imports(name) if target.split(".")[0] == "dgl"]
    assert wrong == [], "import it as `from imvia_graph._dgl import dgl`"


def test_the_reader_of_imports_sees_them():
    # Or the tests above would pass for nothing.
    found = {target for _, target in imports("imvia_graph.kg.graph")}
    assert {"imvia_graph._dgl", "imvia_graph._files", "imvia_graph.errors", "torch"} <= found
    found = {target for _, target in imports("imvia_graph.cli")}
    assert {"imvia_graph.errors", "click"} <= found  # the first is imported within a function
    found = {target for _, target in imports("imvia_graph.cli.fit")}
    assert {"imvia_graph.io", "imvia_graph.run", "imvia_graph.cli.display"} <= found | {
        "imvia_graph." + HOMES["load_kg"]
    }
    assert "dgl" in {target for _, target in imports("imvia_graph._dgl")}


def calls(path):
    """(line, dotted name, keyword arguments) of every call of a module's function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            yield node.lineno, ast.unparse(node.func), keywords


def test_nothing_is_pickled_and_foreign_pickles_give_up_tensors_only():
    wrong = []
    for name, path in SOURCES.items():
        for line, function, keywords in calls(path):
            module, _, verb = function.rpartition(".")
            pickles = module in ("pickle", "cloudpickle", "dill", "joblib") or function in (
                "torch.save",
                "numpy.save",
            )
            unpickles = (verb == "load" and module == "torch") and (
                keywords.get("weights_only") != "True"
            )
            if pickles or unpickles or keywords.get("allow_pickle") == "True":
                wrong.append(f"{name}, line {line}: {function}")
    assert wrong == []
