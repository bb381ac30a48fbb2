"""Views stay in their file: mapped, never copied, picked for a device that could not hold them."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ring_kg, settings
from safetensors.torch import load_file, save_file

import imvia_graph as ig
from imvia_graph import _linked, model
from imvia_graph.nn import multi_view_encoder
from imvia_graph.ops import gated_view_aggregate, picking
from imvia_graph.training import Trainer

HALVES = [torch.float16, torch.bfloat16]


def half_kg(dtype=torch.float16, **options):
    """The ring with features in half precision."""
    kg = ring_kg(24, **options)
    views = {m: kg._views(m) for m in kg.modalities}
    return kg.replace(views={m: v._replace(feat=v.feat.to(dtype)) for m, v in views.items()})


def addresses(kg):
    return [kg.views(modality)[0].data_ptr() for modality in kg.modalities]


@pytest.fixture
def folder(tmp_path):
    return half_kg().save(tmp_path / "kg")


@pytest.fixture
def large(monkeypatch):
    """Features of any size count as large."""
    monkeypatch.setattr(_linked, "LARGE", 0)
    monkeypatch.setattr(_linked, "_cloned", lambda source, path: False)


# -- mapped ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_features_of_a_folder_are_read_from_their_file_up_to_the_kernels(tmp_path, dtype):
    kg = ig.load_kg(half_kg(dtype).save(tmp_path / "kg"), "held-out")
    trainer = Trainer(ig.IMVIA.from_kg(kg, settings()).to("cpu"), kg, settings())
    with open("/proc/self/maps", encoding="utf-8") as file:
        spans = [line.split() for line in file]
    for modality, (feat, _) in trainer.model.views.items():
        assert feat.dtype == dtype
        (name,) = (
            span[-1]
            for span in spans
            if int(span[0].split("-")[0], 16) <= feat.data_ptr() < int(span[0].split("-")[1], 16)
        )
        assert name == str(tmp_path / "kg" / "views" / f"{modality}.safetensors")


def test_a_graph_with_other_triples_names_or_notes_has_the_same_features(folder):
    kg = ig.load_kg(folder, "published")
    changed = kg.replace(train=kg.train[1:], notes=["fewer"], entity_names=["x"] * 24)
    assert addresses(changed) == addresses(kg)
    assert addresses(ig.load_kg(kg, "held-out")) == addresses(kg)
    assert addresses(ig.io.with_views(kg, {"sound": torch.ones(24, 2)}))[:2] == addresses(kg)


def test_other_entities_have_their_views_checked_again(folder):
    kg = ig.load_kg(folder, "published")
    with pytest.raises(ig.DataError, match="id 23 is out of range"):
        kg.replace(entities=kg.entities[:23], train=kg.train[:0].new_tensor([[0, 0, 1]]),
                   valid=None, test=None)  # fmt: skip


def test_only_what_has_to_be_is_scaled_and_that_is_a_copy(folder):
    kg = ig.load_kg(folder, "published")
    views = {m: kg._views(m) for m in kg.modalities}
    views["image"] = views["image"]._replace(feat=views["image"].feat * 2.0**12)
    scaled = ig.IMVIA.from_kg(kg.replace(views=views), settings())
    assert scaled.views["text"][0].data_ptr() == addresses(kg)[1]
    assert scaled.views["image"][0].dtype == torch.float32
    expected = views["image"].feat.double() * scaled.view_scale["image"]
    assert torch.equal(scaled.views["image"][0].double(), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gives_what_the_same_numbers_in_float32_give(dtype, backend):
    half = half_kg(dtype)
    views = {m: half._views(m) for m in half.modalities}
    full = half.replace(views={m: v._replace(feat=v.feat.float()) for m, v in views.items()})
    assert_trains_alike(half, full, settings(backend=backend))


def assert_trains_alike(one, other, chosen):
    found = []
    for kg in (one, other):
        torch.manual_seed(0)
        trainer = Trainer(ig.IMVIA.from_kg(kg, chosen), kg, chosen)
        trainer.fit()
        found.append(trainer)
    for name, value in found[0].model.state_dict().items():
        torch.testing.assert_close(value, found[1].model.state_dict()[name], msg=name)
    assert found[0].progress.best_mrr == pytest.approx(found[1].progress.best_mrr)


# -- picked ---------------------------------------------------------------------------------------


@pytest.fixture
def picked(monkeypatch):
    """Features count as apart from the model; holds how many rows went to it at most."""
    told = SimpleNamespace(most=0, times=0)

    def pick(feat, ptr, entity):
        out = pick_views(feat, ptr, entity)
        told.most, told.times = max(told.most, len(out[0])), told.times + 1
        return out

    pick_views = picking.pick_views
    monkeypatch.setattr(picking, "apart", lambda feat, entity: True)
    monkeypatch.setattr(picking, "pick_views", pick)
    return told


@pytest.mark.parametrize("chosen", [{}, {"regime": "sampled"}, {"candidates": "relation"}], ids=str)
def test_picked_views_train_and_rank_as_those_that_are_there(chosen, backend, picked, monkeypatch):
    chosen = settings(**chosen, backend=backend)
    monkeypatch.setattr(multi_view_encoder, "ENTITIES_AT_A_TIME", 5)
    kg = half_kg()
    by_picking = step_of(kg, chosen)
    assert picked.times
    # Of 24 entities, at most five at a time were there: one of them has 7 images.
    assert picked.most <= 7 + 4 * 2
    monkeypatch.setattr(picking, "apart", lambda feat, entity: False)
    for name, value in step_of(kg, chosen).items():
        torch.testing.assert_close(by_picking[name], value, msg=name)


def step_of(kg, chosen):
    """Losses, gradients and ranks of the first batch."""
    torch.manual_seed(0)
    trainer = Trainer(ig.IMVIA.from_kg(kg, chosen), kg, chosen)
    losses = trainer.train_step(next(iter(trainer.batches)))
    gradients = {name: parameter.grad for name, parameter in trainer.named.items()}
    ranking = ig.rank(trainer.model.eval(), kg.valid, kg.answers())
    return {**losses, **gradients, **ranking.head, **ranking.tail}


def test_picked_views_have_the_gradient_of_those_that_are_there(backend):
    feat = torch.randn(9, 3, requires_grad=True)
    ptr, entity = torch.tensor([0, 4, 4, 7, 9]), torch.tensor([2, 0, 2, 1])
    gate = torch.rand(4, 3)
    gradients = []
    for views in (picking.pick_views(feat, ptr, entity), (feat, ptr, entity)):
        out = gated_view_aggregate(*views, gate, backend=backend)
        gradients.append(torch.autograd.grad(out.square().sum(), feat)[0])
    torch.testing.assert_close(*gradients)
    assert not gradients[0][7:].any()


@pytest.mark.parametrize(
    ("views_on", "device", "size", "expected"),
    [
        ("auto", "cpu", 2**50, True),
        ("auto", "cuda", 49, True),
        ("auto", "cuda", 51, False),
        ("device", "cuda", 51, True),
        ("host", "cuda", 1, False),
        ("host", "cpu", 1, True),
    ],
)
def test_views_move_to_a_device_that_they_leave_room_on(
    views_on, device, size, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert model._belong_on(torch.device(device), size, views_on) is expected


# -- run folders ----------------------------------------------------------------------------------


def run_of(folder, out):
    ig.fit(folder, out=out, settings=settings(epochs=1), validation="published")
    return out / "kg" / "views" / "image.safetensors"


def test_a_run_folder_links_large_features_and_loads(folder, tmp_path, large):
    linked = run_of(folder, tmp_path / "run")
    source = folder / "views" / "image.safetensors"
    assert linked.samefile(source)
    run = ig.load(tmp_path / "run")
    assert torch.equal(run.kg.views("image")[0], load_file(source)["feat"])
    assert not linked.with_name("image.csv").samefile(source.with_suffix(".csv"))


def test_features_that_are_small_are_copied(folder, tmp_path):
    assert not run_of(folder, tmp_path / "run").samefile(folder / "views" / "image.safetensors")


def test_saving_a_graph_elsewhere_links_nothing(folder, tmp_path, large):
    again = ig.load_kg(folder, "published").save(tmp_path / "again")
    source = folder / "views" / "image.safetensors"
    assert not (again / "views" / "image.safetensors").samefile(source)
    assert "links" not in json.loads((again / "kg.json").read_text("utf-8"))


def test_what_replaces_the_source_leaves_a_run_as_it_was(folder, tmp_path, large):
    run_of(folder, tmp_path / "run")
    before = half_kg().views("image")[0]
    kg = half_kg()
    views = {m: kg._views(m) for m in kg.modalities}
    views["image"] = views["image"]._replace(feat=-before)
    kg.replace(views=views).save(folder)
    assert torch.equal(ig.load(tmp_path / "run").kg.views("image")[0], before)
    assert torch.equal(ig.load_kg(folder, "published").views("image")[0], -before)


def test_what_writes_into_the_source_is_noticed(folder, tmp_path, large):
    run_of(folder, tmp_path / "run")
    source = folder / "views" / "image.safetensors"
    with source.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x00\x3c")
    os.utime(source, (0, 0))
    with pytest.raises(ig.DataError, match=r"image\.safetensors has changed since it was linked"):
        ig.load(tmp_path / "run")


class Change(ig.Callback):
    """Gives features other numbers after the first epoch: in their file, or replacing it."""

    def __init__(self, path, replaces):
        self.path, self.replaces = path, replaces

    def on_epoch(self, trainer, record):
        if record["epoch"] == 1:
            feat = load_file(self.path)["feat"]
            other = self.path.with_suffix(".new")
            save_file({"feat": feat.flip(0).contiguous()}, other)
            if self.replaces:
                other.replace(self.path)
            else:
                self.path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("scaled", [False, True])  # of what is scaled the model has a copy
@pytest.mark.parametrize("replaces", [False, True])
def test_features_that_change_while_training_end_it_where_the_model_sees_them(
    scaled, replaces, folder, tmp_path
):
    path = folder / "views" / "image.safetensors"
    if scaled:
        save_file({"feat": load_file(path)["feat"] * 64}, path)
    out, change = tmp_path / "run", Change(path, replaces)
    options = {"settings": settings(epochs=3), "callbacks": [change]}
    if scaled or replaces:
        run = ig.fit(folder, out=out, **options)
        assert ig.load(out).evaluate() == run.evaluate()
        return
    with pytest.raises(ig.DataError, match=r"image\.safetensors has changed during training"):
        ig.fit(folder, out=out, **options)
    assert ig.load(out).progress.epoch == 1
    assert ig.fit(out=out, resume=True).progress.epoch == 3


def test_a_run_folder_that_is_moved_or_copied_loads(folder, tmp_path, large):
    run_of(folder, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(folder)
    expected = half_kg().views("image")[0]
    assert torch.equal(ig.load(tmp_path / "copy").kg.views("image")[0], expected)


def test_features_that_were_changed_in_memory_are_written_as_they_are(folder, tmp_path, large):
    kg = ig.load_kg(folder, "published")
    feat, _ = kg.views("image")
    feat.numpy()[0, 0] = 7  # torch does not notice
    ig.fit(kg, out=tmp_path / "run", settings=settings(epochs=1), validation="published")
    assert load_file(tmp_path / "run" / "kg" / "views" / "image.safetensors")["feat"][0, 0] == 7
    assert load_file(folder / "views" / "image.safetensors")["feat"][0, 0] != 7


def test_a_file_that_holds_more_than_the_features_is_not_linked(folder, tmp_path, large):
    source = folder / "views" / "image.safetensors"
    save_file({**load_file(source), "secret": torch.ones(3)}, source)
    assert list(load_file(run_of(folder, tmp_path / "run"))) == ["feat"]


def test_a_graph_saved_into_its_own_folder_stays(folder, tmp_path, large):
    linked = run_of(folder, tmp_path / "run")
    expected = half_kg().views("image")[0]
    # The run's own graph: it is a link, and becomes a file of its own.
    ig.MultiViewKG.load(tmp_path / "run" / "kg").save(tmp_path / "run" / "kg")
    assert not linked.samefile(folder / "views" / "image.safetensors")
    assert torch.equal(ig.load(tmp_path / "run").kg.views("image")[0], expected)
    # The graph in its folder: nothing to do.
    before = (folder / "views" / "image.safetensors").stat().st_ino
    ig.load_kg(folder, "published").save(folder)
    assert (folder / "views" / "image.safetensors").stat().st_ino == before


@pytest.mark.parametrize("links", [[], {"image": {}}, {"image": {"of": 1, "size": 1}}, "x"])
def test_links_that_make_no_sense_are_an_error(folder, links):
    about = json.loads((folder / "kg.json").read_text("utf-8"))
    (folder / "kg.json").write_text(json.dumps({**about, "links": links}), "utf-8")
    with pytest.raises(ig.DataError, match="'links'"):
        ig.load_kg(folder)


# -- sources --------------------------------------------------------------------------------------


def test_sources_that_nobody_told_take_no_room_and_read_as_empty(tmp_path):
    kg = half_kg()
    assert kg.view_sources("text") == [""] * 46
    assert kg.view_source("text", 3) == ""
    assert kg._views("text").source is None
    again = ig.load_kg(kg.save(tmp_path / "kg"), "published")
    assert again._views("text").source is None
    assert (tmp_path / "kg" / "views" / "text.csv").read_text("utf-8")[
        :21
    ] == "entity,source\ne1,\ne1,"
