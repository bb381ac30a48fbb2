"""Exceptions, whose messages say what was expected, what was received, where, and what to do."""

from __future__ import annotations


class IMVIAError(Exception):
    """Base class of every error that the library raises deliberately."""

    exit_code = 1


class DataError(IMVIAError, ValueError):
    """Triples, vocabularies or views that cannot be used as they are."""

    exit_code = 2


class SettingsError(IMVIAError, ValueError):
    """A setting that does not exist or has an invalid value."""

    exit_code = 2


class UnknownLabelError(IMVIAError, KeyError):
    """An entity, relation, modality or data set name that is not known."""

    exit_code = 2

    def __str__(self) -> str:
        # KeyError would show the message in quotes.
        return str(self.args[0])


class TrainingError(IMVIAError):
    """Training that cannot continue: a loss or a gradient is not finite."""


class OutOfMemoryError(IMVIAError, MemoryError):
    """A step that does not fit into memory, even with the fewest rows at a time."""


class StorageError(IMVIAError, OSError):
    """A write that failed: the disk is full, a quota is reached, or the folder is gone."""


class CheckpointError(IMVIAError):
    """A run folder or checkpoint that cannot be read or does not match."""

    exit_code = 2


class EncoderError(IMVIAError):
    """An encoder that is unknown or not installed, or whose weights are not available."""

    exit_code = 2
