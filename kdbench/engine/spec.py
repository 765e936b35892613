"""One run as it is asked for: suite, architecture, method, options, seed."""

import hashlib
import json
import shlex
from dataclasses import dataclass

import torch

from kdbench.discovery import MethodEntry
from kdbench.errors import UserError, printable
from kdbench.method import Cohort, Method, MethodOptions
from kdbench.results.schema import Identity
from kdbench.seeds import seeded
from kdbench.suite.load import suite_files
from kdbench.suite.suite import Suite

# Raise this when a change to the harness moves numbers: results made before it are then run anew.
HARNESS_VERSION = 1


LONGEST_VARIANT = 120
"""Characters of options in the name of a folder; beyond that, their hash."""


@dataclass(frozen=True)
class RunSpec:
    suite: Suite
    architecture: str
    entry: MethodEntry
    options: MethodOptions
    seed: int

    @property
    def networks(self) -> int:
        """Number of networks K."""
        return self.entry.method.fixed_networks or self.options.networks or self._named_networks

    @property
    def views(self) -> int:
        """Number of views V of each image."""
        return self.entry.method.views or self.networks

    @property
    def method_name(self) -> str:
        """Readable name in paths and tables: options that are not the default stand in it."""
        return self.entry.name + variant(self.options)

    @property
    def label(self) -> str:
        return f"{self.method_name} {self.architecture} seed {self.seed}"

    @property
    def suite_argument(self) -> str:
        """What finds the suite again: its name, or its file's, without the folder."""
        name = self.suite.name.partition("@")[0]
        return name if name in suite_files() else f"./{name}.toml"

    def identity(self) -> Identity:
        return Identity(
            suite=self.suite.name,
            suite_hash=self.suite.digest(),
            architecture=self.architecture,
            method=self.method_name,
            method_hash=self.entry.digest,
            seed=self.seed,
        )

    def fingerprint(self) -> str:
        """Equal for two runs that must give the same numbers."""
        key = [
            HARNESS_VERSION,
            self.identity().model_dump(),
            self.options.model_dump(mode="json"),
        ]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def command(self) -> str:
        """The command that makes this run, without the folders of whoever ran it."""
        changes = self.suite.name.partition("@")[2]
        method = self.entry.name if self.entry.findable else f"./{self.entry.name}.py"
        parts = ["kdbench run", f"--suite {self.suite_argument}", f"--methods {method}"]
        parts += [f"--architectures {self.architecture}", f"--seeds {self.seed + 1}"]
        parts += [f"--{change.replace('=', ' ')}" for change in changes.split(",") if change]
        changed = changed_options(self.options)
        settings = [f"{self.entry.name}.{key}={value}" for key, value in changed.items()]
        parts += [f"--set {shlex.quote(setting)}" for setting in settings]
        return " ".join(parts)

    def check(self) -> None:
        """Refuse a method that does not fit the suite.

        Raises:
            UserError: too few networks, or a number of networks where it is fixed.
        """
        needed, fixed = self.entry.method.minimum_networks, self.entry.method.fixed_networks
        if fixed is not None and self.options.networks not in (None, fixed):
            raise UserError(f"Method '{self.entry.name}' has {fixed} network, always.")
        named = len(self._architectures) > 1
        if len(set(self._architectures)) > 1 and self.entry.method.equal_networks:
            raise UserError(
                f"Method '{self.entry.name}' needs equal networks, and "
                f"'{self.architecture}' mixes them."
            )
        if named and self.options.networks is not None:
            raise UserError(f"'{self.architecture}' says how many networks there are already.")
        if self.networks < needed:
            raise UserError(
                f"Method '{self.entry.name}' needs at least {needed} networks; "
                f"suite '{self.suite.name}' asks for {self.networks}."
            )

    def build(self) -> Method:
        """The method with freshly initialised networks, the same for the same seed."""
        cohort = Cohort(
            self._cohort_architectures(),
            self.suite.data.classes,
            self.seed,
            self.suite.schedule.epochs,
        )
        with seeded(self.seed, "modules"):
            return self.entry.method(cohort, self.options)

    def build_on(self, device: torch.device) -> Method:
        """The same on the device that trains, channels last: convolutions run faster so, on CPUs
        and on GPUs with tensor cores.
        """
        return self.build().to(device).to(memory_format=torch.channels_last)

    @property
    def _architectures(self) -> list[str]:
        """As named: one, or one per network joined by +, the declared student last."""
        return self.architecture.split("+")

    @property
    def _named_networks(self) -> int:
        named = len(self._architectures)
        return named if named > 1 else self.suite.networks

    def _cohort_architectures(self) -> list[str]:
        """One per network; methods that take mixed cohorts deploy their first network."""
        named = self._architectures
        if len(named) == 1:
            return named * self.networks
        return [named[-1], *named[:-1]][: self.networks]


def changed_options(options: MethodOptions) -> dict[str, object]:
    """The options that differ from the method's defaults."""
    defaults = type(options)().model_dump(mode="json")
    return {k: v for k, v in options.model_dump(mode="json").items() if v != defaults[k]}


def variant(options: MethodOptions) -> str:
    """`@key=value,...` for options that differ from the defaults; nothing where none does."""
    # It is the name of a folder: no value may lead elsewhere.
    values = (f"{key}={value}" for key, value in changed_options(options).items())
    changed = [printable(value).replace("/", "_").replace("\\", "_") for value in values]
    text = ",".join(changed)
    if len(text) > LONGEST_VARIANT:
        text = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"@{text}" if text else ""
