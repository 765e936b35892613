"""Results of any accuracy, made of one that is committed; nothing is trained for them."""

import json
from pathlib import Path
from typing import Any

from kdbench.store import Metrics, Result, read, save
from kdbench.suite import Suite, load_suite

COMMITTED = Path(__file__).parents[1] / "results/cifar100-reduced/resnet20"


def committed(method: str) -> Result:
    """A real result, to make others of."""
    found = read(COMMITTED / method / "seed0.json")
    assert isinstance(found, Result)
    return found


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
    """A finished run on a CPU, of the suite's protocol if one is given."""
    template = committed("baseline")
    assert template.cost is not None
    changes: dict[str, Any] = {"method": method, "seed": seed}
    if suite is not None:
        changes |= {"suite": suite.name, "suite_hash": suite.digest()}
    roles = {"student": top1} | {f"peer{index}": peer for index, peer in enumerate(peers)}
    last = {role: Metrics(top1=value, top5=95.0, loss=1.0) for role, value in roles.items()}
    return template.model_copy(
        update={
            "identity": template.identity.model_copy(update=changes | identity),
            "protocol": suite.model_dump(mode="json") if suite else template.protocol,
            "last": last,
            "cost": template.cost.model_copy(update=cost or {}),
            "environment": template.environment.model_copy(update=environment or {}),
        }
    )


def made_seeds(method: str, top1s: list[float], **changes: Any) -> list[Result]:
    """A run for each accuracy, from seed 0."""
    return [made(method, seed, top1, **changes) for seed, top1 in enumerate(top1s)]


def saved(results: Path, change: Any = None) -> Path:
    """A result on the disk, after a change to its JSON."""
    file = save(results, made("dml"))
    if change is not None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return file


CIFAR = load_suite("cifar100")
IMAGENET = load_suite("imagenet")
