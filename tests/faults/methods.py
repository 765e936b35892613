"""Faults in methods and the loss functions they share."""

from faults.planting import Fault, contract, plain, reference

LOSSES = "kdbench/losses.py"
FROZEN = ".requires_grad_(False)"
BUILT = "nn.ModuleList(cohort.build_all())"

LATE_TARGET = (
    (
        "methods/ffsd.py",
        "            targets = distiller.target(shift(previous))\n",
        "            rebuilt = self._reconstruction(distiller, features)\n"
        "            targets = distiller.target(shift(previous))\n",
    ),
    (
        "methods/ffsd.py",
        '{i}"] = self._reconstruction(distiller, features)',
        '{i}"] = rebuilt',
    ),
)

FAULTS = (
    Fault(
        "temperature T for T squared",
        ((LOSSES, "divergence * temperature**2", "divergence * temperature"),),
        ("test_reference.py::test_cross_entropy_and_mutual_kl", reference("one")),
        "kdcl",
    ),
    Fault(
        "temperature 2.2 for 2, kdcl",
        (
            (
                "methods/kdcl.py",
                "temperature: float = Field(default=2.0",
                "temperature: float = Field(default=2.2",
            ),
        ),
        ("test_contract.py::test_options_are_those_of_the_papers[kdcl]",),
        "kdcl",
    ),
    Fault(
        "lost detach, dml",
        ((LOSSES, "[z.detach() for z in logits]", "list(logits)"),),
        (contract("targets detached", "dml"), reference("ffsd")),
        "dml",
    ),
    Fault(
        "lost detach, kdcl",
        (
            (
                "methods/kdcl.py",
                "with torch.no_grad():\n            # In",
                "with torch.enable_grad():\n            # In",
            ),
        ),
        (contract("targets detached", "kdcl"),),
        "kdcl",
    ),
    Fault(
        "lost detach, one",
        (("methods/one.py", "target = gated.detach()", "target = gated"),),
        (contract("targets detached", "one"), reference("one")),
    ),
    Fault(
        "target detached, okddip",
        (("methods/okddip.py", "self.ramp * kl(target, z,", "self.ramp * kl(target.detach(), z,"),),
        (reference("okddip, form network"),),
    ),
    Fault(
        "lost detach, ffsd: its fusion trains the students",
        (("methods/ffsd.py", "[features.stages[-1].detach() for", "[features.stages[-1] for"),),
        (reference("ffsd"),),
        "ffsd",
    ),
    Fault(
        "lost detach, ffsd: its leader trains the fusion",
        (("methods/ffsd.py", "fused.detach(), fused_logits", "fused, fused_logits"),),
        (reference("ffsd"),),
    ),
    Fault(
        "target made after the update of its statistics, ffsd", LATE_TARGET, (reference("ffsd"),)
    ),
    Fault(
        "ramp from 0 for 1, ffsd",
        (("methods/ffsd.py", "ramp(epoch + 1,", "ramp(epoch,"),),
        (reference("ffsd"),),
    ),
    Fault(
        "one view for all networks, kdcl",
        (("methods/kdcl.py", "[network(view).logits for", "[network(views[0]).logits for"),),
        (plain("kdcl"),),
    ),
    Fault(
        "a head in its own consensus, cl_ilr",
        (("methods/cl_ilr.py", "(total - z) / (len(logits) - 1)", "total / len(logits)"),),
        ("test_further_methods.py::test_the_consensus_excludes_the_head_itself",),
    ),
    Fault(
        "an anchor among its positives, mcl",
        (("methods/mcl.py", "labels[None, :]) & ~own", "labels[None, :])"),),
        ("test_further_methods.py::test_mcl_equals_a_second_implementation",),
    ),
    Fault(
        "frozen student, dml",
        (("methods/dml.py", BUILT, BUILT + "\n        self.networks[0]" + FROZEN),),
        ("test_engine.py::test_every_parameter_is_trained_by_exactly_one_group[dml]",),
        "dml",
    ),
    Fault(
        "frozen leader, ffsd",
        (("methods/ffsd.py", "self.leader = leader", "self.leader = leader" + FROZEN),),
        (reference("ffsd"),),
        "ffsd",
    ),
    Fault(
        "KL of a student from itself, dml",
        ((LOSSES, "if j != i]\n        losses", "]\n        losses"),),
        ("test_reference.py::test_cross_entropy_and_mutual_kl", plain("dml")),
    ),
    Fault(
        "labels not smoothed, label_smoothing",
        (("methods/label_smoothing.py", ", label_smoothing=self.smoothing", ""),),
        (plain("label_smoothing"),),
    ),
)
