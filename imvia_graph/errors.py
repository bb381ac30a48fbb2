"""Errors for people: what was expected, what came, where, and what to do."""

from __future__ import annotations


class IMVIAError(Exception):
    """Base class of every error that the library raises on purpose."""

    exit_code = 1


class DataError(IMVIAError, ValueError):
    """Triples, vocabularies or views that cannot be used as they are."""

    exit_code = 2


class SettingsError(IMVIAError, ValueError):
    """A setting that does not exist or has a value that it cannot take."""

    exit_code = 2


class UnknownLabelError(IMVIAError, KeyError):
    """An entity, relation, modality or data set name that is not known."""

    exit_code = 2

    def __str__(self) -> str:
        # KeyError would show the message in quotes.
        return str(self.args[0])


class TrainingError(IMVIAError):
    """Training that cannot go on: a loss or a gradient that is no number."""


class OutOfMemoryError(IMVIAError, MemoryError):
    """A step that does not fit into memory, however few rows are taken at a time."""


class StorageError(IMVIAError, OSError):
    """What a disk did not take: it is full, a quota is reached, or the folder is gone."""


class CheckpointError(IMVIAError):
    """A run folder or checkpoint that cannot be read or does not fit."""

    exit_code = 2


class EncoderError(IMVIAError):
    """An encoder that is not known, not installed, or whose weights cannot be had."""

    exit_code = 2
