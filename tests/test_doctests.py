"""The examples in the docstrings run and give what they say."""

import doctest
import importlib

import pytest
import torch
from test_layers_of_imports import SOURCES

#: Their examples train a model.
SLOW = {
    "imvia_graph.run",
    "imvia_graph.export",
    "imvia_graph.report",
    "imvia_graph.tracking",
    "imvia_graph.encode.encode",
}
MODULES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in SOURCES
    if not name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes does so here
    torch.manual_seed(0)
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0


def test_every_public_class_and_function_has_an_example_that_runs():
    import imvia_graph as ig

    without = set()
    for public in ig.__all__:
        value = getattr(ig, public)
        is_error = isinstance(value, type) and issubclass(value, Exception)
        if not callable(value) or is_error:
            continue
        finder = doctest.DocTestFinder(recurse=False)
        if not any(test.examples for test in finder.find(value, public)):
            without.add(public)
    # Shown by the examples of what they belong to: MultiViewKG, Run, fit.
    assert without <= {"Callback", "Explanation", "Prediction", "Trainer", "Views", "load", "rank"}
