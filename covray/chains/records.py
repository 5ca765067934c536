"""What the JSON files of a dataset folder hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import PlainSerializer, field_validator

from covray.config.section import JsonObject
from covray.io.records import Record, RecordPart


class PairSet(RecordPart):
    """The pairs of a manifest, whatever their order."""

    rows: int
    """Pairs of the manifest."""
    sha256: str
    """SHA-256 (hex) over the sorted pair ids, each as 8 bytes, little-endian."""


class AppendedPairs(RecordPart):
    """A larger manifest that `covray build --append` gave the dataset."""

    manifest: str
    """The manifest, which holds the pairs of the versions before it too."""
    pairs: PairSet
    """All of its pairs."""


class DatasetRecord(Record):
    """What a build is: written before its first row, and compared by every build that continues it."""

    FILE = "_dataset.json"
    FIX = "build the dataset again, into another folder"

    config: JsonObject
    """The resolved configuration of `covray build`."""
    identity: JsonObject
    """The part of the configuration that decides the tokens."""
    fingerprints: dict[str, str]
    """SHA-256 (hex) of `prior` (empty where no frame needs it), `tokenizer` and `codebook`; with `prior.context` also
    of `text_encoder`, or of `aligner` and `vlm`."""
    latent_shape: tuple[int, int, int] | None = None
    """Channels, height and width of the prior's latents; null where no frame needs the prior."""
    tokenizer_size_px: int
    """Side of the pictures that are tokenized."""
    tokens_per_image: int
    """Tokens of one picture."""
    codes: int | None = None
    """Codes of the tokenizer's codebook; absent in datasets of early versions."""
    pairs: PairSet | None = None
    """The manifest's pairs; absent in datasets of early versions."""
    classes: JsonObject | None = None
    """The classes of segmentation (names, numbers, void) as `meta` of the manifest has them; absent without any."""
    appended: list[AppendedPairs] | None = None
    """Later versions of the dataset, the oldest first; absent where nothing was appended. Version 1 is `pairs`."""
    tracker_runs: dict[str, str] | None = None
    """The runs in trackers, by tracker; absent without any."""
    plugins: dict[str, str] | None = None
    """The plug-ins in use, such as `task matting`, each with package and version; absent without any."""

    @property
    def pair_sets(self) -> list[PairSet | None]:
        """Return the pairs of every version that was begun, the first version's first."""
        return [self.pairs, *(later.pairs for later in self.appended or ())]

    def of_version(self, version: int) -> DatasetRecord:
        """Return the record of a version, counted from 1, as a dataset that was never larger has it."""
        if version == 1:
            return self
        # Versions count from 1, and the first has no entry here.
        later = (self.appended or [])[version - 2]
        return self.model_copy(update={"pairs": later.pairs, "config": self.config | {"pairs": later.manifest}})

    @field_validator("config")
    @classmethod
    def _has_chains(cls, config: JsonObject) -> JsonObject:
        """Without these keys nobody can tell which chains the rows hold."""
        for key in ("methods", "lengths", "alphas"):
            if key not in config:
                raise ValueError(f"lacks {key}")
        return config


class TaskCounts(RecordPart):
    """The rows of one task."""

    asked: int
    """Pairs of the manifest."""
    written: int
    """Good rows."""
    rejected: int
    """Rows with an error."""
    reasons: dict[str, int]
    """Rejected rows by the reason of their error."""


class VersionCounts(RecordPart):
    """The rows of one version of a dataset, those of the versions before it included."""

    asked: int
    """Pairs of the version's manifest."""
    written: int
    """Good rows."""
    rejected: int
    """Rows with an error."""
    per_task: dict[str, TaskCounts]
    """The same by task."""


class Audit(Record):
    """What a finished build wrote: every pair of the manifest is in exactly one row."""

    FILE = "_audit.json"
    FIX = "delete it, and run the same covray build again"

    asked: int
    """Pairs of the manifest."""
    written: int
    """Good rows."""
    rejected: int
    """Rows with an error."""
    per_task: dict[str, TaskCounts]
    """The same by task."""
    actors: int | None = None
    """Actors that computed. This and what follows is of the build's last run."""
    chains_per_s: float | None = None
    """Rows a second, without every actor's first block; null where nothing was computed."""
    busy_share: float | None = None
    """Share of the actors' time spent computing; time that a block waits counts as idle."""
    row_s: float | None = None
    """Seconds of an actor for one row."""
    load_s: float | None = None
    """Seconds, beyond its rows, until an actor's first block was done: its start, imports, models and warm-up."""
    last_block_s: float | None = None
    """Seconds from the start of the pool until the last block was computed."""
    unet_evaluations: int | None = None
    """Forward passes of the UNet, counted by picture."""
    padded_share: float | None = None
    """Share of further passes that only filled batches."""
    seconds: float | None = None
    """Seconds from the start of the pool until the last shard was written."""
    rows_of_earlier_runs: int | None = None
    """Rows that earlier runs of the same build had written."""
    versions: list[VersionCounts] | None = None
    """What every version holds, the first to the last; absent where nothing was appended."""

    @property
    def version(self) -> int:
        """Return the newest finished version, counted from 1."""
        # Datasets of one version do not list versions.
        return len(self.versions or [None])

    def counts(self) -> VersionCounts:
        """Return the rows of the newest finished version."""
        return VersionCounts(asked=self.asked, written=self.written, rejected=self.rejected, per_task=self.per_task)

    def of_version(self, version: int) -> Audit:
        """Return the audit of a finished version; of an earlier one only the counts are known."""
        if version == self.version:
            return self
        # The figures of speed are of the last run, so that they are not those of an earlier version.
        assert self.versions is not None
        return Audit(**dict(self.versions[version - 1]))


WholeAudit = Annotated[Audit, PlainSerializer(Audit.to_json)]
"""An audit inside of another object, with the version that begins its file."""
