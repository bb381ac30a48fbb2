"""Helpers of several test files: small graphs, folders and comparisons."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

import imvia_graph as ig
from imvia_graph.settings import Settings

#: Root of the repository, with imvia_graph/, cli/ and datasets/.
ROOT = Path(__file__).resolve().parents[1]

#: Settings of a tiny model with the default heads, which trains fast and equally on every machine.
TINY = {
    "dim": 8,
    "complex_head": True,
    "complex_rank": 3,
    "information_dim": 4,
    "batch_size": 16,
    "epochs": 3,
    "negatives": 5,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "device": "cpu",
    "precision": "float32",
    "backend": "reference",
}


def settings(**changes) -> Settings:
    return Settings.create(TINY, changes)


def paper_settings(**changes) -> Settings:
    """Return settings of a model with only the paper's heads."""
    return settings(**{"complex_head": False, **changes})


def ring_triples(size: int) -> torch.Tensor:
    """Return (2 size, 3) triples: each entity has a next entity and an opposite entity."""
    entity = torch.arange(size)
    after = torch.stack([entity, torch.zeros_like(entity), (entity + 1) % size], dim=1)
    opposite = torch.stack([entity, torch.ones_like(entity), (entity + size // 2) % size], dim=1)
    return torch.cat([after, opposite])


def ring_kg(size: int = 12, *, valid: int = 3, test: int = 3, views: bool = True, **options):
    """Return a graph of two relations, with image and text views of uneven counts."""
    generator = torch.Generator().manual_seed(0)
    triples = ring_triples(size)
    triples = triples[torch.randperm(len(triples), generator=generator)]
    seen = {}
    if views:
        # Entity 0 has no view at all, entity 1 many images.
        images = torch.tensor([1] * 7 + [i for i in range(2, size) if i % 2])
        texts = torch.arange(1, size).repeat_interleave(2)
        seen["image"] = ig.Views(torch.randn(len(images), 6, generator=generator), images)
        seen["text"] = ig.Views(torch.randn(len(texts), 5, generator=generator), texts)
    return ig.MultiViewKG(
        [f"e{i}" for i in range(size)],
        ["after", "opposite"],
        triples[valid + test :],
        triples[:valid],
        triples[valid : valid + test],
        seen,
        **{"name": "ring", **options},
    )


def write_folder(folder: Path, files: dict) -> Path:
    """Write files by relative path: text, bytes, or a dict of tensors as safetensors."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            save_file(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_bytes(content.encode())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Return the names of the tensors that are not bitwise equal in two safetensors files."""
    mine, theirs = load_file(one), load_file(other)
    names = sorted(mine.keys() | theirs.keys())
    assert names, f"{one} and {other} hold no tensors"
    return [
        name
        for name in names
        if name not in mine
        or name not in theirs
        or mine[name].dtype != theirs[name].dtype
        or mine[name].shape != theirs[name].shape
        or mine[name].numpy().tobytes() != theirs[name].numpy().tobytes()
    ]


def same_weights(one, other) -> bool:
    """Return whether two modules have equal states."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def assert_same_kg(one, other) -> None:
    """Assert that two graphs are equal in all their fields."""
    for field in ("entities", "relations", "entity_names", "relation_names", "modalities"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.name == other.name
    assert one.notes == other.notes
    for split in ("train", "valid", "test"):
        assert torch.equal(one.triples(split), other.triples(split)), split
    for modality in one.modalities:
        for mine, theirs in zip(one.views(modality), other.views(modality), strict=True):
            assert mine.dtype == theirs.dtype, modality
            assert torch.equal(mine, theirs), modality
        assert one.view_sources(modality) == other.view_sources(modality), modality


def score_all(model, entity, relation, batch_size=10_000):
    """Yield (positions, scores by head) of queries against all entities, relation by relation."""
    groups = [torch.argsort(relation, stable=True)]
    shared = model.settings.candidates == "shared"
    if not shared:
        counts = torch.unique_consecutive(relation[groups[0]], return_counts=True)[1]
        groups = groups[0].split(counts.tolist())
    for group in groups:
        tables = model.candidates(None if shared else relation[group[0]])
        for positions in group.split(batch_size):
            mine = relation[positions]
            yield positions, model.scores(model.queries(entity[positions], mine), tables, mine)


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run Python in another process with the environment of this one."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def in_groups(sizes, work) -> None:
    """Call `work` in a process alone, in each of a group of two, or whatever sizes are given.

    A group is forked from this process, where torchrun would import torch anew for each of its
    processes. So call it in a process that has not computed anything yet.
    """
    for size in sizes:
        start_processes(
            _member, (size, _free_port(), work), nprocs=size, join=True, start_method="fork"
        )


def _member(rank, size, port, work):
    if size > 1:
        described = {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in described.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="none")
    work()


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
