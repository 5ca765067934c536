"""The errors a user can meet. Each carries one line: what, where, what to do."""


class CovrayError(Exception):
    """A mistake the user can mend; commands print it as one line and end with exit code 2."""


class ConfigError(CovrayError):
    """A configuration that cannot be used: unknown key, value out of bounds, contradiction."""


class ManifestError(CovrayError):
    """A manifest or a user's list that cannot be read as pairs."""


class WeightsError(CovrayError):
    """A model folder that is missing, incomplete, or not what its configuration says."""


class DatasetError(CovrayError):
    """A dataset folder that is unfinished, damaged, or belongs to another configuration."""


class PairError(Exception):
    """One bad pair. Never ends a job: its text becomes the row's ``error``.

    The text is ``reason: detail``; ``reason`` is one snake_case word, so that rejects can be counted by it.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 200 characters; of an OSError what went wrong, not where."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(str(said).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
