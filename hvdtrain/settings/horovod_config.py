"""What can be told to Horovod, as a section of a configuration. Nothing here knows how Horovod is told."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import MOST_SECONDS, option, settle

HOROVOD_GROUP = "horovod (backend horovod)"
"""Heading in ``--help``."""


DYNAMIC_TIMELINE = "DYNAMIC"
"""As the name of a timeline's file: Horovod shall be ready for one that begins later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HorovodConfig:
    """What can be told to Horovod; the section ``horovod`` of a configuration, ``--horovod.cycle-time-ms`` as a flag.

    What is left out keeps Horovod's own default, or what horovodrun's flags and HOROVOD_* variables say, but for the
    fusion threshold (see docs/horovod.md).
    """

    compression: str = option(
        "none",
        "gradients travel as they are, or in two bytes a value: fp16 (summed as such), bf16 (summed in float32)",
        group=HOROVOD_GROUP,
        choices=("none", "fp16", "bf16"),
    )
    op: str = option(
        "average",
        "how gradients are combined: average, or adasum (Maleki et al. 2020; 2, 4, 8, ... ranks, needs MPI)",
        group=HOROVOD_GROUP,
        choices=("average", "adasum"),
    )
    gradient_predivide_factor: float = option(
        1.0,
        "divide gradients by this before the sum, and multiply by it after",
        group=HOROVOD_GROUP,
        metavar="X",
        above=0,
    )
    num_groups: int | None = option(
        None,
        "N grouped all-reduces, or 0: each gradient by itself, fused by Horovod",
        group=HOROVOD_GROUP,
        metavar="N",
        at_least=0,
        default_text="packed by --bucket-mb",
    )
    fusion_threshold_mb: float | None = option(
        None,
        "size of Horovod's fusion buffer, in MiB; 0 fuses nothing",
        group=HOROVOD_GROUP,
        metavar="MIB",
        at_least=0,
        at_most=2**20,
        default_text="0, and 128 with --horovod.num-groups or --horovod.autotune",
    )
    cycle_time_ms: float | None = option(
        None,
        "how often Horovod looks for work, in milliseconds",
        group=HOROVOD_GROUP,
        metavar="MS",
        at_least=0,
        at_most=10**6,
        default_text="1",
    )
    cache_capacity: int | None = option(
        None,
        "tensors that Horovod remembers, to negotiate them faster; 0 for none",
        group=HOROVOD_GROUP,
        metavar="N",
        at_least=0,
        default_text="1024",
    )
    autotune: bool = option(
        False, "search for the best fusion threshold and cycle time while training", group=HOROVOD_GROUP
    )
    autotune_log: str | None = option(
        None, "file for what autotune tries (CSV)", group=HOROVOD_GROUP, metavar="FILE", default_text="none"
    )
    hierarchical_allreduce: bool = option(False, "reduce within each node first (NCCL only)", group=HOROVOD_GROUP)
    hierarchical_allgather: bool = option(False, "gather within each node first (MPI only)", group=HOROVOD_GROUP)
    timeline: str | None = option(
        None,
        "file for Horovod's trace of every tensor, for chrome://tracing",
        group=HOROVOD_GROUP,
        metavar="FILE",
        default_text="none",
    )
    timeline_mark_cycles: bool = option(False, "mark Horovod's cycles in the trace", group=HOROVOD_GROUP)
    stall_check_s: float | None = option(
        None,
        "seconds after which Horovod warns of tensors that some ranks lack; 0 for never",
        group=HOROVOD_GROUP,
        metavar="SECONDS",
        at_least=0,
        at_most=MOST_SECONDS,
        duration=True,
        default_text="60",
    )
    stall_shutdown_s: float | None = option(
        None,
        "seconds after which Horovod ends a job that stalls so; 0 for never (--timeout does, in any case)",
        group=HOROVOD_GROUP,
        metavar="SECONDS",
        at_least=0,
        at_most=MOST_SECONDS,
        duration=True,
        default_text="0",
    )
    process_sets: bool = option(False, "allow groups of ranks (backend.group), at a small cost", group=HOROVOD_GROUP)

    def check_reduce_dtype(self, asked: str, *, bf16: bool) -> None:
        """Refuse another type of the exchange beside these settings.

        Args:
            asked: How it was asked for, for the message.
            bf16: It is bfloat16.

        Raises:
            ConfigError: They say a type too, or cannot combine that one.
        """
        if self.compression != "none":
            raise ConfigError(
                f"{asked} and --horovod.compression {self.compression} both say in which type gradients travel; give one of them"
            )
        if self.op == "adasum" and bf16:
            raise ConfigError(
                "--horovod.op adasum does not go with --reduce-dtype bf16, in which Horovod cannot combine gradients"
            )

    def check_exchange(self, asked: str) -> None:
        """Refuse settings that say how Horovod combines gradients, beside an exchange that is not Horovod's own.

        Args:
            asked: How it was asked for, for the message.

        Raises:
            ConfigError: There are such settings.
        """
        said = [
            ("compression", self.compression != "none"),
            ("op adasum", self.op == "adasum"),
            ("gradient-predivide-factor", self.gradient_predivide_factor != 1.0),
            ("num-groups", self.num_groups is not None),
        ]
        named = [f"--horovod.{name}" for name, given in said if given]
        if named:
            raise ConfigError(
                f"{asked} does not go with {', '.join(named)}, which say how Horovod itself exchanges gradients; leave one of them out"
            )

    def __post_init__(self) -> None:
        settle(self, "horovod")
        if self.autotune_log is not None and not self.autotune:
            raise ConfigError("--horovod.autotune-log needs --horovod.autotune")
        if self.timeline_mark_cycles and self.timeline is None:
            raise ConfigError("--horovod.timeline-mark-cycles needs --horovod.timeline FILE")
        if self.op == "adasum" and (self.compression == "bf16" or self.gradient_predivide_factor != 1.0):
            raise ConfigError(
                "--horovod.op adasum goes with neither --horovod.compression bf16 nor --horovod.gradient-predivide-factor"
            )
