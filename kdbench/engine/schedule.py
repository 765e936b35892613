"""Learning rates as a pure function of the step, independent of the number of processes."""

from kdbench.suite.suite import Schedule


def learning_rate_factor(step: int, steps_per_epoch: int, schedule: Schedule) -> float:
    """Return the factor of the base learning rate for a global step, counted from 0.

    The factor rises linearly during warm-up and is multiplied by gamma at each milestone.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    passed = sum(step >= round(milestone * steps_per_epoch) for milestone in schedule.milestones)
    return schedule.gamma**passed
