"""Specification of one run: suite, architecture, method, options and seed."""

import hashlib
import json
import shlex
from dataclasses import dataclass

import torch

from kdbench.discovery import MethodEntry
from kdbench.errors import UserError, pluralize, printable
from kdbench.method import Cohort, Method, MethodOptions
from kdbench.results.schema import Identity
from kdbench.seeds import seeded
from kdbench.suite.load import suite_files
from kdbench.suite.suite import Suite

HARNESS_VERSION = 1
"""Version of the harness; raise it when a change moves numbers, so that older results are stale."""

MAX_VARIANT_LENGTH = 120
"""Maximum length of the options in a folder name; longer ones are replaced by their hash."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines the numbers of one run, apart from the data."""

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
        """Name in paths and tables, with the options that differ from the defaults."""
        return self.entry.name + variant(self.options)

    @property
    def label(self) -> str:
        """Short name in messages, such as `dml resnet20 seed 0`."""
        return f"{self.method_name} {self.architecture} seed {self.seed}"

    @property
    def suite_argument(self) -> str:
        """Value of --suite that selects this suite: its name, or the name of its file."""
        name = self.suite.name.partition("@")[0]
        return name if name in suite_files() else f"./{name}.toml"

    def identity(self) -> Identity:
        """Return the identity that the run's result stores."""
        return Identity(
            suite=self.suite.name,
            suite_hash=self.suite.digest(),
            architecture=self.architecture,
            method=self.method_name,
            method_hash=self.entry.digest,
            seed=self.seed,
        )

    def fingerprint(self) -> str:
        """Return a hash that is equal for runs that must give the same numbers."""
        key = [
            HARNESS_VERSION,
            self.identity().model_dump(),
            self.options.model_dump(mode="json"),
        ]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def command(self) -> str:
        """Return the command that reproduces this run, without local paths."""
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
        """Check that the method, its options and the architecture fit together.

        Raises:
            UserError: The method does not support this number or mix of networks.
        """
        needed, fixed = self.entry.method.minimum_networks, self.entry.method.fixed_networks
        if fixed is not None and self.options.networks not in (None, fixed):
            raise UserError(
                f"Method '{self.entry.name}' always has {pluralize(fixed, 'network')}; "
                "remove the option 'networks'."
            )
        named = len(self._architectures) > 1
        if len(set(self._architectures)) > 1 and self.entry.method.equal_networks:
            raise UserError(
                f"Method '{self.entry.name}' needs networks of one architecture, but "
                f"'{self.architecture}' mixes several."
            )
        if named and self.options.networks is not None:
            raise UserError(
                f"'{self.architecture}' already sets the number of networks; "
                "remove the option 'networks'."
            )
        if self.networks < needed:
            raise UserError(
                f"Method '{self.entry.name}' needs at least {needed} networks, but suite "
                f"'{self.suite.name}' has {self.networks}."
            )

    def build(self) -> Method:
        """Return the method with freshly initialized networks; equal seeds give equal weights."""
        cohort = Cohort(
            self._cohort_architectures(),
            self.suite.data.classes,
            self.seed,
            self.suite.schedule.epochs,
        )
        with seeded(self.seed, "modules"):
            return self.entry.method(cohort, self.options)

    def build_on(self, device: torch.device) -> Method:
        """Return the method on a device, in channels-last format.

        Convolutions are faster in this format on CPUs and on GPUs with tensor cores.
        """
        return self.build().to(device).to(memory_format=torch.channels_last)

    @property
    def _architectures(self) -> list[str]:
        """Architectures as the user named them: one, or one per network with the student last."""
        return self.architecture.split("+")

    @property
    def _named_networks(self) -> int:
        named = len(self._architectures)
        return named if named > 1 else self.suite.networks

    def _cohort_architectures(self) -> list[str]:
        """Return one architecture per network.

        Methods that take mixed cohorts deploy the first network they build.
        """
        named = self._architectures
        if len(named) == 1:
            return named * self.networks
        return [named[-1], *named[:-1]][: self.networks]


def changed_options(options: MethodOptions) -> dict[str, object]:
    """Return the options that differ from the method's defaults."""
    defaults = type(options)().model_dump(mode="json")
    return {k: v for k, v in options.model_dump(mode="json").items() if v != defaults[k]}


def variant(options: MethodOptions) -> str:
    """Return `@key=value,...` for the options that differ from the defaults, or an empty string."""
    # The text becomes part of a folder name, so values must not contain separators.
    values = (f"{key}={value}" for key, value in changed_options(options).items())
    changed = [printable(value).replace("/", "_").replace("\\", "_") for value in values]
    text = ",".join(changed)
    if len(text) > MAX_VARIANT_LENGTH:
        text = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"@{text}" if text else ""
