"""Results of no run: made up, for tests of what is drawn and written of them."""

from typing import Any

from kdbench.store import Cost, Environment, Epoch, Identity, Metrics, Result
from kdbench.suite import load_suite

FLOPS = 10**12


def metrics(top1: float) -> Metrics:
    return Metrics(top1=top1, top5=min(100.0, top1 + 20), loss=1.0)


def made(
    method: str,
    seed: int = 0,
    top1: float | None = 50.0,
    flops: int | None = FLOPS,
    jobs: int = 1,
    **changes: Any,
) -> Result:
    """Four epochs on the digits; a top-1 of None stands for a run that diverged in the third."""
    suite = load_suite("digits").with_epochs(4)
    epochs = 4 if top1 is not None else 2
    final = 30.0 if top1 is None else top1
    history = [
        Epoch(
            epoch=epoch,
            learning_rate=0.1,
            losses={"ce/student": 2.0 / epoch, "ce/peer0": 3.0 / epoch, "kl/student": 0.01},
            metrics={"student": metrics(final - 4 + epoch), "peer0": metrics(final - 5)},
        )
        for epoch in range(1, epochs + 1)
    ]
    last = {
        "student": metrics(final),
        "peer0": metrics(final - 1),
        "peer1": metrics(final - 3),
        "ensemble": metrics(final + 2),
        "mean": metrics(final - 4 / 3),
    }
    content = {
        "fingerprint": "0" * 32,
        "identity": Identity(
            suite=suite.name,
            suite_hash=suite.digest(),
            architecture="resnet8",
            method="any",
            method_hash="0123456789abcdef",
            seed=seed,
        ).model_copy(update={"method": method}),  # a copy takes names that no file may hold
        "options": {},
        "protocol": suite.model_dump(mode="json"),
        "status": "diverged" if top1 is None else "finished",
        "reason": "'ce/student' is nan in epoch 3" if top1 is None else None,
        "last": None if top1 is None else last,
        "best_on_test": None,
        "history": history,
        "cost": None if top1 is None else _cost(flops, jobs),
        "environment": _environment(method),
    }
    return Result(**content | changes)


def _cost(flops: int | None, jobs: int) -> Cost:
    return Cost(
        images_per_second=1000.0,
        step_milliseconds=64.0,
        training_seconds=90.0,
        evaluation_seconds=1.0,
        peak_memory_bytes=2**30,
        jobs=jobs,
        peak_memory_kind="process",
        parameters_trained=234_126,
        parameters_deployed=78_042,
        student_forward_flops=10**6,
        training_flops=flops,
    )


def _environment(method: str) -> Environment:
    return Environment(
        kdbench="0.1.0",
        commit=None,
        dirty=None,
        python="3.11",
        torch="2.11",
        accelerate="1.10",
        system="Linux",
        device="cpu",
        threads=1,
        processes=1,
        command=f"kdbench run --methods {method}",
    )
