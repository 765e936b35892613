"""Faults in methods and the loss functions they share."""

from faults.planting import contract, plain, reference

FFSD = "methods/ffsd.py"
KDCL = "methods/kdcl.py"
LOSSES = "kdbench/losses.py"
FROZEN = ".requires_grad_(False)"
BUILT = "nn.ModuleList(cohort.build_all())"

TARGET = "            targets = distiller.target(shift(previous))\n"
REBUILT = "self._reconstruction(distiller, features)"
LATE_TARGET = (
    (FFSD, TARGET, f"            rebuilt = {REBUILT}\n{TARGET}"),
    (FFSD, f'{{i}}"] = {REBUILT}', '{i}"] = rebuilt'),
)

FAULTS = {
    "temperature T for T squared": (
        ((LOSSES, "divergence * temperature**2", "divergence * temperature"),),
        ("test_reference.py::test_formulas_of_the_authors_code[dml]", reference("one")),
        "kdcl",
    ),
    "temperature 2.2 for 2, kdcl": (
        ((KDCL, "Field(default=2.0", "Field(default=2.2"),),
        ("test_contract.py::test_options_are_those_of_the_papers[kdcl]",),
        "kdcl",
    ),
    "lost detach, dml": (
        ((LOSSES, "[z.detach() for z in logits]", "list(logits)"),),
        (contract("targets detached", "dml"), reference("ffsd")),
        "dml",
    ),
    "lost detach, kdcl": (
        ((KDCL, "torch.no_grad():\n            # In", "torch.enable_grad():\n            # In"),),
        (contract("targets detached", "kdcl"),),
        "kdcl",
    ),
    "lost detach, one": (
        (("methods/one.py", "target = gated.detach()", "target = gated"),),
        (contract("targets detached", "one"), reference("one")),
    ),
    "target detached, okddip": (
        (("methods/okddip.py", "self.ramp * kl(target, z,", "self.ramp * kl(target.detach(), z,"),),
        (reference("okddip, form network"),),
    ),
    "lost detach, ffsd: its fusion trains the students": (
        ((FFSD, "[features.stages[-1].detach() for", "[features.stages[-1] for"),),
        (reference("ffsd"),),
        "ffsd",
    ),
    "lost detach, ffsd: its leader trains the fusion": (
        ((FFSD, "fused.detach(), fused_logits", "fused, fused_logits"),),
        (reference("ffsd"),),
    ),
    "target made after the update of its statistics, ffsd": (LATE_TARGET, (reference("ffsd"),)),
    "ramp from 0 for 1, ffsd": (((FFSD, "ramp(epoch + 1,", "ramp(epoch,"),), (reference("ffsd"),)),
    "one view for all networks, kdcl": (
        ((KDCL, "[network(view).logits for", "[network(views[0]).logits for"),),
        (plain("kdcl"),),
    ),
    "a head in its own consensus, cl_ilr": (
        (("methods/cl_ilr.py", "(total - z) / (len(logits) - 1)", "total / len(logits)"),),
        ("test_further_methods.py::test_the_consensus_excludes_the_head_itself",),
    ),
    "an anchor among its positives, mcl": (
        (("methods/mcl.py", "labels[None, :]) & ~own", "labels[None, :])"),),
        ("test_further_methods.py::test_mcl_equals_a_second_implementation",),
    ),
    "frozen student, dml": (
        (("methods/dml.py", BUILT, BUILT + "\n        self.networks[0]" + FROZEN),),
        ("test_engine.py::test_every_parameter_is_trained_by_exactly_one_group[dml]",),
        "dml",
    ),
    "frozen leader, ffsd": (
        ((FFSD, "self.leader = leader", "self.leader = leader" + FROZEN),),
        (reference("ffsd"),),
        "ffsd",
    ),
    "KL of a student from itself, dml": (
        ((LOSSES, "if j != i]\n        losses", "]\n        losses"),),
        ("test_reference.py::test_formulas_of_the_authors_code[dml]", plain("dml")),
    ),
    "labels not smoothed, label_smoothing": (
        (("methods/label_smoothing.py", ", label_smoothing=self.smoothing", ""),),
        (plain("label_smoothing"),),
    ),
}
