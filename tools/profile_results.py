"""What was measured of a run's stages, and its JSON.

A stage's rate is what that stage alone could do with what the run gives it: the loader's threads, the cores that
compute, the GPU, on all ranks together. Stages of one side work one after the other on the same threads (or the same
device), so that the seconds that each takes for a batch add up to about those of the whole side; the two sides work at
the same time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

STAGES = (
    "storage_cold",
    "storage_warm",
    "decode",
    "crop",
    "photometric",
    "host_to_device",
    "forward",
    "loss",
    "backward",
    "communication",
    "optimizer",
)
"""In the order in which an image meets them."""

FORMAT, FORMAT_VERSION = "twinview-profile", 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage can do by itself."""

    name: str
    """One of `STAGES`."""
    images_per_sec: float
    """Source images a second, of all ranks together, were there no other stage."""
    side: Literal["loading", "training"]
    """Which of the two that work at the same time it belongs to."""
    seconds_per_batch: float
    """That a rank's share of a global batch takes it: the median."""
    spread: float
    """Between the quartiles, as a share of the median."""
    how: str
    """What was measured, in a line."""
    place: Literal["host", "device"] = "host"
    """Whose time it takes: the host's threads, or the GPU's."""

    def __post_init__(self) -> None:
        if self.name not in STAGES:
            raise ValueError(f"a stage's `name` must be one of {', '.join(STAGES)}, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A run's stages, each alone and all together, and what one needs to know to judge them."""

    stages: dict[str, Stage]
    """By name, in the order of `STAGES`; a stage that this run does not have is not there."""
    loading_images_per_sec: float
    """The real loader with nobody computing, all ranks together."""
    training_images_per_sec: float
    """The real training step, fed from memory, all ranks together."""
    together_images_per_sec: float
    """Loader and training step, as in a run."""
    data_wait: float
    """Share of that time in which the step waited for the loader, 0 to 1."""
    world_size: int
    """Ranks."""
    local_world_size: int
    """Ranks on each machine."""
    local_batch_size: int
    """Images of a rank in one step."""
    global_batch_size: int
    """Images of all ranks in one step."""
    num_samples: int
    """Images that the run trains on."""
    device: str
    """`cpu` or `cuda`."""
    device_name: str
    """The processor's or the GPU's."""
    num_cores: int
    """CPU cores that a rank may use."""
    loader: str
    """`data.loader`."""
    num_threads: int
    """Decoding threads (or processes) of each rank."""
    cpu_threads: int
    """Threads that each rank computes with on the CPU."""
    precision: str
    """`bf16` or `fp32`."""
    encoder: dict[str, Any]
    """`depth`, `width` and `sk` (selective kernels)."""
    image_side: int
    """Pixels of a view's side."""
    num_views: int
    """Of each image."""
    bytes_per_image_stored: float
    """In the set, on average."""
    bytes_per_image_to_device: float
    """That the loader hands to the device: labels included; on a CPU, the bytes that a batch takes."""
    parameters: int
    """Numbers that are trained."""
    gradient_bytes: int
    """That the ranks average in a step: one float32 for each."""
    memory: dict[str, float]
    """Bytes: `peak_bytes` of the GPU, or of the process on a CPU; `activation_bytes_per_image`, measured between two
    batch sizes; `state_bytes` of parameters, gradients and momentum on a rank."""
    flops_per_image: float | None
    """Floating-point operations of forward and backward, of which a product with a sum makes two; None: not counted."""
    config: dict[str, Any]
    """The resolved configuration."""
    environment: dict[str, Any]
    """Versions, commit, host and its load."""
    command: str
    """What made this."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`; `from_json` gives the same profile back."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)

    @classmethod
    def from_json(cls, values: object) -> Profile:
        """The profile of what `to_json` gave, or `json.loads` of it.

        Raises:
            ValueError: it is none, or is damaged, or another version's; one line.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"`format` must be {FORMAT}, got {found}; give what tools.profile_throughput wrote")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"`format_version` must be {FORMAT_VERSION}, got {values.get('format_version')}; measure again"
            )
        given = {name: value for name, value in values.items() if name not in ("format", "format_version")}
        _check_names(cls, given)
        stages = given["stages"]
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            raise ValueError("`stages` must hold a stage under each name; measure again")
        for stage in stages.values():
            _check_names(Stage, stage)
        return cls(**given | {"stages": {name: Stage(**stage) for name, stage in stages.items()}})


def _check_names(kind: type, given: dict[str, Any]) -> None:
    """Refuse what has not exactly the fields of `kind`."""
    wanted = {field.name for field in fields(kind)}
    if differing := sorted(wanted ^ given.keys()):
        raise ValueError(
            f"a {kind.__name__.lower()} must have the fields of this version, found a difference in "
            f"{', '.join(differing)}; measure again"
        )


def rate(seconds_per_batch: float, global_batch_size: int) -> float:
    """Images a second over all ranks, where a rank's share of a batch takes so long on each of them."""
    return global_batch_size / max(seconds_per_batch, 1e-9)  # a clock's tick: nothing is infinitely fast
