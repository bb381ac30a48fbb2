"""Compare trained runs: means and deviations over seeds, and paired differences."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import polars as pl
import torch
from torch import Tensor

from imvia_graph.checkpoint import check_run
from imvia_graph.errors import DataError
from imvia_graph.evaluation import Ranking
from imvia_graph.kg import Split
from imvia_graph.model import DECISION
from imvia_graph.run import Run, load

#: A trained run, its folder, or the ranks by another model (`imvia_graph.evaluation.rank_scorer`).
Ranked: TypeAlias = "Run | Ranking | str | os.PathLike[str]"
#: Labels of the entities and of the relations.
Labels: TypeAlias = tuple[pl.Series, pl.Series]

#: Half the width of a 95 % interval of the normal distribution, in standard deviations.
_Z = 1.959964


class _Member(NamedTuple):
    """A ranked run."""

    name: str
    #: Without the seed; None for the ranks by another model.
    settings: dict[str, Any] | None
    ranking: Ranking
    #: What the ids of the triples stand for; None if it is not known.
    labels: Labels | None


def compare(
    runs: Mapping[str, Ranked | Sequence[Ranked]] | Sequence[Ranked],
    split: Split = "test",
    *,
    device: str = "auto",
    on_batch: Callable[[str, int, int], None] | None = None,
) -> pl.DataFrame:
    r"""Rank the triples of a split with several runs and compare their metrics.

    Parameters
    ----------
    runs : mapping of str to runs, or sequence of runs
        Run folders, runs, or rankings by other models. With a mapping, each name is a row, and its
        runs differ in the seed, say. In a sequence, runs whose settings differ in the seed alone
        make a row, which is named after their folders. Folders are loaded one at a time.
    split : {"test", "valid", "train"}
        Split to rank. All runs must have the same triples in it. Default: ``"test"``.
    device : str, optional
        Where folders are loaded. Default: ``"auto"``, a GPU if there is one.
    on_batch : callable, optional
        Called with the name of a run, the number of queries ranked, and their total.

    Returns
    -------
    polars.DataFrame
        One row per method, in the given order, with the columns ``name``, ``runs`` (their number);
        ``mrr``, ``mr``, ``hits@1`` and so on, means over the runs, as fractions; each of these with
        ``_std``, the sample standard deviation over the runs, null for one run; ``difference``, the
        MRR less that of the first row, and ``interval``, half the width of its 95 % confidence
        interval, null in the first row; and ``settings``, those that differ from the first row's.

    Raises
    ------
    DataError
        If there are no runs, if one is named twice, or if they do not rank the same triples.
    CheckpointError
        If a folder holds no run.

    Notes
    -----
    For each of the :math:`n` triples, take the mean reciprocal rank of its two queries over the
    runs of a row, less that over the runs of the first row. ``difference`` is the mean of these
    values, and ``interval`` is :math:`1.96\, s / \sqrt{n}` with their standard deviation :math:`s`.
    It says how far the difference may be due to the choice of triples; the deviation over seeds is
    in ``mrr_std``.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> wide = [ig.fit("countries", epochs=1, dim=16, seed=seed) for seed in (0, 1)]
    >>> narrow = ig.fit("countries", epochs=1, dim=8)
    >>> table = ig.compare({"wide": wide, "narrow": narrow})
    >>> table.select("name", "runs", "settings").rows()
    [('wide', 2, ''), ('narrow', 1, 'dim=8')]
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    asked = {name: _as_list(group) for name, group in named.items()}
    _check_asked(asked)
    found: list[_Member] = []
    rows: dict[str, list[_Member]] = {}
    for name, group in asked.items():
        rows[name] = []
        for run in group:
            found.append(_ranked(run, split, device, on_batch, found))
            rows[name].append(found[-1])
    if not isinstance(runs, Mapping):
        rows = _by_settings(found)
    first = next(iter(rows.values()))
    return pl.DataFrame(
        [_row(name, members, first) for name, members in rows.items()],
        infer_schema_length=None,
        schema_overrides={"difference": pl.Float64, "interval": pl.Float64},
    )


def _check_asked(asked: Mapping[str, Sequence[Ranked]]) -> None:
    """Raise an error for missing runs and for folders that are no run or that a row has twice."""
    if not any(asked.values()):
        raise DataError("compare: expected runs, received none.")
    for name, group in asked.items():
        if not group:
            raise DataError(f"compare: expected runs, {name!r} has none.")
        folders = [Path(run) for run in group if isinstance(run, (str, os.PathLike))]
        seen: set[Path] = set()
        for folder in folders:
            check_run(folder)
            if folder.resolve() in seen:
                raise DataError(f"compare: {folder} is named twice. Name it once.")
            seen.add(folder.resolve())


def _as_list(runs: Any) -> list[Any]:
    one = isinstance(runs, (Run, Ranking, str, os.PathLike))
    return [runs] if one else list(runs)


def _ranked(
    run: Ranked,
    split: Split,
    device: str,
    on_batch: Callable[[str, int, int], None] | None,
    others: Sequence[_Member],
) -> _Member:
    """Rank the split with a run, if the other runs have ranked the same triples."""
    if isinstance(run, Ranking):
        _check_triples("a ranking", run.triples, None, others)
        return _Member("a ranking", None, run, None)
    if not isinstance(run, Run):
        run = load(run, device)
    name = str(run.folder) if run.folder else run.kg.name or "run"
    labels = run.kg.label_columns
    _check_triples(name, run.kg.triples(split), labels, others)
    told = None if on_batch is None else lambda done, total: on_batch(name, done, total)
    ranking = run.rank(split, on_batch=told)
    settings = run.settings.model_dump(mode="json", exclude={"seed"})
    return _Member(name, settings, ranking, labels)


def _check_triples(
    name: str, triples: Tensor, labels: Labels | None, others: Sequence[_Member]
) -> None:
    """Raise an error if other runs have ranked other triples."""
    for other in others:
        same = torch.equal(triples, other.ranking.triples)
        if same and labels is not None and other.labels is not None:
            same = all(one.equals(two) for one, two in zip(labels, other.labels, strict=True))
        if not same:
            raise DataError(
                f"compare: {name} ranks other triples than {other.name}. Compare runs of one graph"
                " and one split."
            )


def _by_settings(found: Sequence[_Member]) -> dict[str, list[_Member]]:
    """Group runs whose settings differ in the seed alone, and name the groups."""
    groups: dict[str, list[_Member]] = defaultdict(list)
    for number, member in enumerate(found):
        # Rankings by other models are not grouped.
        key = str(number) if member.settings is None else repr(member.settings)
        groups[key].append(member)
    names = [_name([Path(member.name).name for member in members]) for members in groups.values()]
    if len(set(names)) < len(names):
        names = [members[0].name for members in groups.values()]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return dict(zip(names, groups.values(), strict=True))


def _name(names: Sequence[str]) -> str:
    """Return what the names of runs have in common, without a number at the end."""
    if len(names) == 1:
        return names[0]
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in common).rstrip("0123456789").rstrip("-_. ") or names[0]


def _row(name: str, members: Sequence[_Member], first: Sequence[_Member]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "runs": len(members)}
    metrics = [member.ranking.metrics()["both"] for member in members]
    for metric in metrics[0]:
        values = torch.tensor([one[metric] for one in metrics], dtype=torch.float64)
        row[metric] = values.mean().item()
        row[f"{metric}_std"] = values.std().item() if len(values) > 1 else None
    row["difference"] = row["interval"] = None
    if members is not first:
        difference = _reciprocal(members) - _reciprocal(first)
        row["difference"] = difference.mean().item()
        if len(difference) > 1:
            row["interval"] = _Z * difference.std().item() / math.sqrt(len(difference))
    mine, other = members[0].settings or {}, first[0].settings or {}
    row["settings"] = " ".join(
        f"{key}={_plain(value)}" for key, value in mine.items() if other.get(key, value) != value
    )
    return row


def _reciprocal(members: Sequence[_Member]) -> Tensor:
    """Return the (n,) mean reciprocal ranks of triples over both queries and all runs."""
    ranks = [
        side[DECISION] for member in members for side in (member.ranking.tail, member.ranking.head)
    ]
    return torch.stack(ranks).reciprocal().mean(dim=0)


def _plain(value: Any) -> str:
    """Return a value as ``--set`` takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
