"""Results of any accuracy, created from a committed one without training."""

import json
from pathlib import Path
from typing import Any

from kdbench.results.files import read_result, write_result
from kdbench.results.schema import Epoch, Metrics, Result, best_on_test
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

COMMITTED = Path(__file__).parents[1] / "results/cifar100-reduced/resnet20"
CIFAR = load_suite("cifar100")
IMAGENET = load_suite("imagenet")
FOUR_EPOCHS = load_suite("digits").with_epochs(4)
FLOPS = 10**12
LOST: dict[str, Any] = {"status": "diverged", "last": None, "cost": None}


def committed(method: str) -> Result:
    """A real result from which others are created."""
    found = read_result(COMMITTED / method / "seed0.json")
    assert isinstance(found, Result)
    return found


def metrics(top1: float) -> Metrics:
    return Metrics(top1=top1, top5=95.0, loss=1.0)


def one_epoch(last: dict[str, Metrics]) -> dict[str, Any]:
    """Return the fields of a result with one epoch."""
    epoch = Epoch(epoch=1, learning_rate=0.1, losses={"ce/student": 1.0}, metrics=last)
    return {"last": last, "history": [epoch], "best_on_test": best_on_test([epoch])}


def made(
    method: str,
    seed: int = 0,
    top1: float = 50.0,
    *,
    suite: Suite | None = None,
    peers: tuple[float, ...] = (),
    cost: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    **identity: str,
) -> Result:
    """Return a finished run on a CPU, with the suite's protocol if one is given."""
    template = committed("baseline")
    assert template.cost is not None
    named = {} if suite is None else {"suite": suite.name, "suite_hash": suite.digest()}
    changes = {"method": method, "seed": seed} | named | identity
    roles = {"student": top1} | {f"peer{index}": peer for index, peer in enumerate(peers)}
    update = {
        "identity": template.identity.model_copy(update=changes),
        "protocol": suite.model_dump(mode="json") if suite else template.protocol,
        "cost": template.cost.model_copy(update={"training_flops": None} | (cost or {})),
        "environment": template.environment.model_copy(update=environment or {}),
    }
    update |= one_epoch({role: metrics(value) for role, value in roles.items()})
    return template.model_copy(update=update)


def made_seeds(method: str, top1s: list[float], first: int = 0, **changes: Any) -> list[Result]:
    """Return one run per accuracy, with consecutive seeds."""
    return [made(method, seed, top1, **changes) for seed, top1 in enumerate(top1s, first)]


def drawable(
    method: str,
    seed: int = 0,
    top1: float | None = 50.0,
    flops: int | None = FLOPS,
    jobs: int = 1,
    **changes: Any,
) -> Result:
    """Four epochs on the digits with all roles; without a top-1, a run that diverged."""
    final = 30.0 if top1 is None else top1
    result = made(
        method,
        seed,
        final,
        suite=FOUR_EPOCHS,
        cost={"training_flops": flops, "jobs": jobs, "training_seconds": 90.0},
        environment={"command": f"kdbench run --methods {method}"},
        architecture="resnet8",
    )
    roles = {"student": 0, "peer0": -1, "peer1": -3, "ensemble": 2, "mean": -4 / 3}
    last = {role: metrics(final + more) for role, more in roles.items()}
    history = [
        Epoch(
            epoch=epoch,
            learning_rate=0.1,
            losses={"ce/student": 2.0 / epoch, "ce/peer0": 3.0 / epoch, "kl/student": 0.01},
            metrics={"student": metrics(final - 4 + epoch), "peer0": metrics(final - 5)},
        )
        for epoch in range(1, 5)
    ]
    history[-1] = history[-1].model_copy(update={"metrics": last})
    update = {"options": {}, "notes": {}, "history": history, "last": last}
    update |= {"best_on_test": best_on_test(history)}
    if top1 is None:
        update |= LOST | {"reason": "'ce/student' is nan in epoch 3", "history": history[:2]}
    return result.model_copy(update=update | changes)


def saved(results: Path, change: Any = None) -> Path:
    """Write a result after a change to its JSON."""
    file = write_result(results, made("dml"))
    if change is not None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return file
