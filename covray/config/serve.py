"""The configuration of ``covray serve``."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from covray.config.evaluate import named_run
from covray.config.generate import GeneratorConfig
from covray.config.section import Section


class LimitsConfig(Section):
    """What one request may ask; a request beyond a limit is refused with the reason."""

    bytes: int = Field(default=32 * 2**20, ge=1024)
    """Bytes of a request's body (status 413)."""
    pixels: int = Field(default=16 * 2**20, ge=4)
    """Pixels of one picture, checked before it is decoded (413)."""
    examples: int = Field(default=16, ge=0, le=63)
    """Example pairs of a request (422)."""
    candidates: int = Field(default=16, ge=1, le=1024)
    """Candidates of a query, by ``best_of`` or ``vote`` (422)."""
    queue: int = Field(default=64, ge=1)
    """Requests that are waiting or being answered; further ones get 503 at once."""
    upload_s: float = Field(default=30.0, gt=0)
    """Seconds in which a request's head must arrive, and then its body (408)."""
    time_s: float = Field(default=120.0, gt=0)
    """Seconds from the arrival of the body to the end of the answer (504)."""


class ReplicasConfig(Section):
    """The processes that answer. Answers do not depend on their number."""

    min: int = Field(default=1, ge=1)
    """Replicas that are always kept."""
    max: int = Field(default=1, ge=1)
    """Replicas at most; Ray Serve starts them when requests wait."""
    queries: int = Field(default=8, ge=1)
    """Requests of one replica, waiting ones included, beyond which another replica is started."""
    cpus: float = Field(default=1.0, gt=0)
    """Logical CPUs that one replica reserves."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one replica, whole or a fraction; by default 1 where the cluster has GPUs, else 0."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is smaller than min ({self.min})")
        return self


class ThinkServeConfig(Section):
    """ThinkDiff beside the adapters: pictures and words in, a model's text and the drawn answer out."""

    folder: str | None = None
    """Folder with the parts ``aligner`` (an aligner's folder or a finished run of ``covray think train``), ``painter``,
    ``text``, and the model that the aligner reads: ``vlm``, or ``clip`` of a vision tower. Null: none answers."""
    kind: Literal["unet", "flux", "sd3", "pixart", "cogvideox"] = "unet"
    """Kind of the painter."""
    steps: int = Field(default=25, ge=1, le=1000)
    """Steps of a picture. With ``unet`` they must divide the model's training steps."""
    guidance: float = Field(default=3.0, ge=1.0, le=100.0)
    """Scale of the guidance; 1: none."""
    seed: int = Field(default=42, ge=0)
    """Of the noise that every picture begins with."""
    instruction: str = "Describe the next picture."
    """What the vision-language model reads before words; the default is the nano model's, the published one is that of
    ``paper/thinkdiff-cobsat``."""


class ServeConfig(Section):
    """``covray serve``: answer queries over HTTP with trained adapters."""

    adapters: tuple[str, ...] = Field(min_length=1)
    """Finished runs of ``covray train``, each ``RUN`` or ``NAME=RUN``; the default name of a run is its folder's."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than loopback needs a token."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    generator: GeneratorConfig = GeneratorConfig()
    """How the models are loaded, as for ``covray generate``; fields left null are taken from each run."""
    batch_wait_s: float = Field(default=0.02, ge=0, le=10)
    """Seconds that a query waits for others which can share its batch of at most ``generator.batch`` rows."""
    gallery: int = Field(default=6, ge=0, le=24)
    """Training pairs of each task that everybody who may ask can look at, and show as examples; 0: none."""
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    think: ThinkServeConfig = ThinkServeConfig()

    @field_validator("adapters")
    @classmethod
    def _names_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        counts = Counter(named_run(entry)[0] for entry in value)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"two adapters have the name {repeated[0]}; give each as NAME=RUN")
        return value

    @field_validator("generator")
    @classmethod
    def _no_adapter(cls, value: GeneratorConfig) -> GeneratorConfig:
        if value.adapter is not None:
            raise ValueError("adapter: give it in adapters")
        return value

    def generators(self) -> dict[str, GeneratorConfig]:
        """Return the models of each adapter by its name, in the order in which they were given."""
        configs = {}
        for entry in self.adapters:
            name, run = named_run(entry)
            configs[name] = self.generator.model_copy(update={"adapter": run})
        return configs
