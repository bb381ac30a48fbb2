"""Fixtures that several test files share."""

import pytest
import torch
from hypothesis import settings

import imvia_graph as ig
from imvia_graph.ops import scatter

# No deadlines, since times vary on a shared machine; examples are the same in each run.
settings.register_profile("imvia", deadline=None, derandomize=True)
settings.load_profile("imvia")

needs_torch_scatter = pytest.mark.skipif(
    not scatter.usable(torch.device("cpu")), reason="torch-scatter does not load"
)


@pytest.fixture(autouse=True, scope="session")
def _temporary_state(tmp_path_factory):
    """Keep the key that signs KG folders in a temporary folder, not in that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(
    params=["reference", pytest.param("torch_scatter", marks=needs_torch_scatter), "numba"]
)
def backend(request):
    """Each installed backend of `ops.gated_view_aggregate`."""
    return request.param


@pytest.fixture
def odd_kg():
    """Seven entities, two relations, repeated triples, three modalities with odd names and widths.

    Entity 6 has no view, entity 0 has views of every modality.
    """
    entity = {"a.b": [3, 0, 3, 5, 0, 3], "keys": [0, 1], "видео": [5, 4, 0, 2, 2]}
    views = {
        modality: ig.Views(torch.randn(len(ids), width), torch.tensor(ids))
        for (modality, ids), width in zip(entity.items(), (3, 1, 4), strict=True)
    }
    train = [[0, 0, 1], [0, 0, 1], [1, 1, 2], [2, 0, 3], [3, 1, 0], [4, 0, 5], [6, 1, 6], [0, 0, 5]]
    return ig.MultiViewKG(
        entities=[f"e{i}" for i in range(7)],
        relations=["r0", "r1"],
        train=torch.tensor(train),
        valid=torch.tensor([[0, 0, 2], [6, 1, 0]]),
        test=torch.tensor([[0, 0, 4], [5, 0, 4], [0, 0, 4], [1, 0, 3]]),
        views=views,
    )


def randomised(module):
    """Randomise and return a module, so that no initial zero hides a wrong term."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module
