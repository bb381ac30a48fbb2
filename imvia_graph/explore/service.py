"""The explorer's answers as plain data, independent of HTTP."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from rapidfuzz import fuzz, process

from imvia_graph._display import folded, nearest, shown
from imvia_graph.encode import Encoder
from imvia_graph.errors import DataError, UnknownLabelError
from imvia_graph.inference import (
    End,
    Prediction,
    Predictor,
    Side,
    decision_weights,
    end_of,
    explain,
)
from imvia_graph.pictures import Pictures
from imvia_graph.run import Run

#: Number of entities or names up to which similar names are searched for, too.
FUZZY = 50_000
#: Maximum letters of a search text; further letters are ignored.
LONGEST_SEARCH = 200

Json = dict[str, Any]


class Service:
    """Queries about a run, answered from candidate tables in memory.

    The model answers one query at a time, so that each has all cores.
    """

    def __init__(
        self,
        run: Run,
        pictures: Pictures,
        text_encoder: Encoder | None = None,
        held: int | None = None,
    ) -> None:
        self.run, self.kg, self.pictures = run, run.kg, pictures
        self.predictor = Predictor(run.model.eval(), run.kg, held)
        self.text_encoder = text_encoder
        if text_encoder is not None:
            if getattr(text_encoder, "modality", None) != "text":
                raise DataError(f"text_encoder: expected an encoder of texts: {text_encoder!r}.")
            views = run.model.views
            width = views["text"][0].shape[1] if "text" in views else None
            if text_encoder.width != width:
                raise DataError(
                    f"text_encoder: {run.kg.title} was trained on {width or 'no'} features per"
                    f" text, but {text_encoder.name!r} makes {text_encoder.width}. Use the graph's"
                    " encoder."
                )
        self._lock = threading.Lock()
        #: Names without case and accents, and such labels, if the graph's names are not its labels.
        self._folded = [[folded(name) for name in self.kg.entity_names]]
        if self.kg.entity_names != self.kg.entities:
            self._folded.append([folded(label) for label in self.kg.entities])
        self._ids = {
            kind: _Ids(labels, names)
            for kind, labels, names in (
                ("entity", self.kg.entities, self.kg.entity_names),
                ("relation", self.kg.relations, self.kg.relation_names),
            )
        }
        # Compute the candidate tables now rather than at the first query.
        self.predictor.prepare()

    # -- the run and its entities ---------------------------------------------------------------

    def about(self) -> Json:
        """Return the run's graph, heads, and relations with their frequencies."""
        kg = self.kg
        count = torch.bincount(kg.train[:, 1], minlength=kg.num_relations).tolist()
        return {
            "run": self.run.folder.name if self.run.folder else kg.name,
            "graph": kg.name,
            "entities": kg.num_entities,
            "triples": len(kg.train) + len(kg.valid) + len(kg.test),
            "epochs": self.run.progress.epoch,
            "heads": self.run.model.heads,
            "modalities": self.run.model.modalities,
            "encodes_texts": self.text_encoder is not None,
            "relations": [
                {"label": label, "name": name, "train": train}
                for label, name, train in zip(kg.relations, kg.relation_names, count, strict=True)
            ],
        }

    def search(self, text: str, limit: int) -> list[Json]:
        """Return entities whose name or label starts with, contains or resembles the text."""
        exact = self._ids["entity"].find(text)
        wanted = folded(text[:LONGEST_SEARCH].strip())
        if not wanted:
            found = [*exact, *range(min(limit, self.kg.num_entities))]
            found = list(dict.fromkeys(found))[:limit]
        else:
            # An entity may be found by both its name and its label.
            ranked = chain.from_iterable(_containing(texts, wanted) for texts in self._folded)
            found = [i for _, _, i in heapq.nsmallest(len(self._folded) * limit, ranked)]
            found = list(dict.fromkeys([*exact, *found]))[:limit]
            if len(found) < limit and self.kg.num_entities <= FUZZY:
                alike = process.extract(
                    wanted, self._folded[0], scorer=fuzz.WRatio, limit=limit, score_cutoff=75
                )
                found = list(dict.fromkeys([*found, *(i for _, _, i in alike)]))[:limit]
        return [{"label": self.kg.entities[i], "name": self.kg.entity_names[i]} for i in found]

    # -- queries --------------------------------------------------------------------------------

    def complete(
        self,
        relation: str,
        head: str | None,
        tail: str | None,
        top: int,
        known: bool,
        itself: bool,
    ) -> Json:
        """Return the answers to a query, the decision's weights, and the given entity's views."""
        if (head is None) == (tail is None):
            raise DataError("Give either head or tail: the end of the triple that is known.")
        given = head if head is not None else tail
        assert given is not None
        entity, relation_id = self._id("entity", given), self._id("relation", relation)
        under = relation_id + (0 if head is not None else self.kg.num_relations)
        label = self.kg.entities[entity]
        with self._lock:
            answers = self.predictor.predict(
                relation=self.kg.relations[relation_id],
                k=top,
                include_known=known,
                include_self=itself or None,
                **({"head": label} if head is not None else {"tail": label}),
            )
            weights = decision_weights(self.run.model, under)
            views = end_of(self.predictor, entity, under)
        return {
            "relation": self._relation(relation_id),
            "asked": "tail" if head is not None else "head",
            "given": self._end(views),
            "weights": weights,
            "answers": _answers(answers),
        }

    def explain(self, head: str, relation: str, tail: str) -> Json:
        """Explain a triple; `imvia_graph.explain` as plain data."""
        names = {
            "head": self.kg.entities[self._id("entity", head)],
            "relation": self.kg.relations[self._id("relation", relation)],
            "tail": self.kg.entities[self._id("entity", tail)],
        }
        with self._lock:
            found = explain(self.predictor, self.kg, **names)
        return {
            **found.as_dict(),
            "head": self._end(found.head),
            "tail": self._end(found.tail),
        }

    def complete_new(
        self,
        relation: str,
        ask: Side,
        views: Mapping[str, Sequence[Sequence[float]]],
        texts: Sequence[str],
        top: int,
    ) -> Json:
        """Return answers for an entity unknown to the model, by its views, and a note on that.

        Blank texts are ignored.
        """
        relation_id = self._id("relation", relation)
        features = {name: _features(name, rows) for name, rows in views.items() if rows}
        given, texts = len(texts), [text for text in texts if text.strip()]
        if given and not texts and not features:
            raise DataError(
                "texts: expected at least one that is not blank, or features in views; received"
                f" {given} that {'is' if given == 1 else 'are'} blank."
            )
        if texts:
            if self.text_encoder is None:
                raise DataError(
                    "This service does not encode texts: send features, or start the service with"
                    " --text-encoder."
                )
            if "text" in features:
                raise DataError("Give texts or features of the modality 'text', not both.")
        with self._lock, torch.inference_mode():
            if texts and self.text_encoder is not None:
                prepared = [self.text_encoder.prepare(text) for text in texts]
                features["text"] = self.text_encoder.encode(prepared)
            answers = self.predictor.predict_new(
                features, relation=self.kg.relations[relation_id], ask=ask, k=top
            )
        heads = list(answers[0].heads) if answers else []
        return {
            "relation": self._relation(relation_id),
            "asked": ask,
            "heads": heads,
            "note": "The model was not trained on this entity: only the heads of its views score"
            f" answers ({', '.join(heads)}).",
            "answers": _answers(answers),
        }

    def picture(self, modality: str, view: int) -> bytes:
        """Return a view as a small WebP picture."""
        found = None
        if modality in self.run.model.modalities and view < len(self.run.model.views[modality][0]):
            found = self.pictures.small(modality, view)
        if found is None:
            raise UnknownLabelError("There is no such picture.")
        return found

    # -- parts of answers -----------------------------------------------------------------------

    def _id(self, kind: str, name: str) -> int:
        """Return the id of the one entity or relation with a label or display name."""
        found = self._ids[kind].find(name)
        if len(found) != 1:
            how = "are called" if found else "is called or labelled"
            raise UnknownLabelError(
                f"{len(found) or 'No'} {'entities' if found and kind == 'entity' else kind}"
                f" {how} '{shown(name, 80)}'.{'' if found else self._suggestion(kind, name)}"
            )
        return found[0]

    def _suggestion(self, kind: str, name: str) -> str:
        """Return a sentence that suggests names like an unknown one, if the search is quick."""
        ids = self._ids[kind]
        if len(ids.by_label) > FUZZY:
            return ""
        alike = nearest(name[:LONGEST_SEARCH], [*ids.by_label, *ids.by_name])
        quoted = ", ".join(f"'{shown(known, 80)}'" for known in alike)
        return f" The nearest known: {quoted}." if alike else " None is similar."

    def _relation(self, relation: int) -> Json:
        return {"label": self.kg.relations[relation], "name": self.kg.relation_names[relation]}

    def _end(self, end: End) -> Json:
        views = {
            modality: [
                {
                    **view._asdict(),
                    "picture": self.pictures.path(modality, view.view) is not None,
                }
                for view in rows
            ]
            for modality, rows in end.views.items()
        }
        return {"label": end.entity, "name": end.name, "views": views}


class _Ids:
    """Ids by label, or else by display name."""

    def __init__(self, labels: Sequence[str], names: Sequence[str]) -> None:
        self.by_label = {label: i for i, label in enumerate(labels)}
        self.by_name: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            self.by_name.setdefault(name, []).append(i)

    def find(self, name: str) -> list[int]:
        if name in self.by_label:
            return [self.by_label[name]]
        return self.by_name.get(name, [])


def _containing(texts: Sequence[str], wanted: str) -> Iterator[tuple[int, int, int]]:
    """Yield the sort key (lowest first) and index of each text that contains ``wanted``."""
    return (
        (_closeness(text, wanted), len(text), i) for i, text in enumerate(texts) if wanted in text
    )


def _closeness(name: str, wanted: str) -> int:
    """Return 0 if the name is ``wanted``, 1 if it starts so, 2 if a word does, 3 otherwise."""
    if name == wanted:
        return 0
    if name.startswith(wanted):
        return 1
    return 2 if f" {wanted}" in name else 3


def _answers(answers: Sequence[Prediction]) -> list[Json]:
    return [
        {
            "rank": rank,
            "label": answer.entity,
            "name": answer.name,
            "score": answer.score,
            "heads": answer.heads,
            "known": answer.known,
        }
        for rank, answer in enumerate(answers, 1)
    ]


def _features(modality: str, rows: Sequence[Sequence[float]]) -> torch.Tensor:
    if len({len(row) for row in rows}) > 1:
        raise DataError(f"views: the rows of '{shown(modality, 80)}' are not of one length.")
    return torch.tensor(rows, dtype=torch.float32)
