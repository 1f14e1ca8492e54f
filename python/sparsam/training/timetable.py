"""When a training run prunes, and how far: sparsities on the axis of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsam import schedules
from sparsam.config import PruningConfig, Schedule, ScheduleName
from sparsam.inputs.checks import check_sparsity, expected, integer, positive
from sparsam.patterns import NM

__all__ = ["Timetable", "config_at"]

_SAMPLES = 1000


@dataclass(frozen=True)
class Timetable:
    """At which steps the masks are updated, and to which sparsity.

    Attributes:
        curve: The schedule.
        begin: The step of the first update; steps count from 0.
        end: The step of the last, where the final sparsity is reached.
        every: The number of steps between updates from `begin` on; the last update is at `end`.
        initial: The sparsity at `begin`.
        final: The sparsity at `end`.
    """

    curve: Schedule
    begin: int
    end: int
    every: int
    initial: float
    final: float

    @classmethod
    def of(
        cls,
        config: PruningConfig,
        *,
        default: ScheduleName,
        begin: int,
        end: int | None,
        every: int | None,
        initial: float,
    ) -> Timetable:
        """Returns the timetable for a configuration and the arguments of a pruner.

        Args:
            config: Its schedule, its target and its num_iterations count.
            default: The schedule where the configuration has none.
            begin: The step of the first update.
            end: The step of the last; None: `begin`, allowed with "one_shot" only.
            every: The steps between updates. None: as many as give num_iterations updates, or 100.
            initial: The sparsity at `begin`.

        Raises:
            ValueError: A number is out of range, `end` is missing, the schedule decreases, or its sparsity is
                not that of an N:M pattern.
        """
        schedule = default if config.schedule is None else config.schedule
        curve = schedules.resolve(schedule)
        if integer("begin", begin) < 0:
            raise ValueError(expected("begin", begin, "a step of at least 0", "count steps from 0"))
        if end is None:
            if not isinstance(curve, schedules.OneShot):
                wanted = f"the step at which schedule {schedule!r} reaches {config.target_sparsity}"
                raise ValueError(expected("end", end, wanted, "pass end=, such as the last step"))
            end = begin
        if integer("end", end) < begin:
            raise ValueError(expected("end", end, f"a step of at least begin, {begin}", "raise it"))
        if every is None:
            updates = 100 if config.num_iterations is None else config.num_iterations
            every = math.ceil((end - begin) / max(updates - 1, 1)) or 1
        table = cls(
            curve,
            begin,
            end,
            positive("every", every),
            check_sparsity("initial_sparsity", initial),
            config.target_sparsity,
        )
        if not isinstance(schedule, tuple):
            reached = schedules.sample(
                schedule,
                num_iterations=min(table.updates, _SAMPLES),
                initial=table.initial,
                final=table.final,
            )
            if isinstance(config.pattern, NM) and set(reached) != {config.pattern.sparsity}:
                wanted = f"'one_shot' with pattern {config.pattern}, which has one sparsity"
                raise ValueError(expected("schedule", schedule, wanted, "leave it out"))
        return table

    @property
    def updates(self) -> int:
        """The number of updates."""
        return 1 + math.ceil((self.end - self.begin) / self.every)

    def updates_at(self, step: int) -> bool:
        """Whether the masks are updated after a step."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def sparsity_at(self, step: int) -> float:
        """The sparsity that an update after a step reaches."""
        progress = 1.0 if step >= self.end else max(0.0, (step - self.begin) / (self.end - self.begin))
        return check_sparsity("schedule", self.curve.at(progress, initial=self.initial, final=self.final))

    def describe(self) -> dict[str, object]:
        """The values that identify a timetable, in plain types."""
        middle = [self.curve.at(i / 10, initial=self.initial, final=self.final) for i in range(11)]
        return {"begin": self.begin, "end": self.end, "every": self.every, "schedule": middle}


def config_at(config: PruningConfig, sparsity: float, final: float) -> PruningConfig:
    """Returns the configuration of an intermediate step: sparsities in proportion to the schedule.

    Args:
        config: What is pruned at the end.
        sparsity: That of the step.
        final: That of the end. The sparsities of overrides (but those of N:M patterns) and of an allocation
            that is a mapping become `sparsity / final` of what they are.
    """
    share = sparsity / final if final else 1.0
    allocation = config.allocation
    if isinstance(allocation, Mapping):
        allocation = {name: value * share for name, value in allocation.items()}
    return replace(
        config,
        allocation=allocation,
        target_sparsity=sparsity,
        schedule=None,
        num_iterations=None,
        overrides={name: own.scaled(share) for name, own in config.overrides.items()},
    )
