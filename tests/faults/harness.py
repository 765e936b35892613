"""Faults in training, evaluation, storage and reports."""

from faults.planting import batches, contract, invariant, reference

BATCHES = "kdbench/data/decoded/batches.py"
CHECKPOINT = "kdbench/engine/checkpoint.py"
EVALUATE = "kdbench/engine/evaluate.py"
LOSSES = "kdbench/losses.py"
OPTIMIZERS = "kdbench/engine/optimizers.py"
PART = "kdbench/engine/part.py"
RANKS = "kdbench/launch/ranks.py"
RUN = "kdbench/engine/run.py"
SCHEDULE = "kdbench/engine/schedule.py"
STEP = "kdbench/engine/step.py"
SUMMARY = "kdbench/report/analysis/summary.py"
VERDICTS = "kdbench/report/analysis/verdicts.py"

OPTIMIZER_STATE = (
    '        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})'
)

UNWATCH = """        self._over.set()
        self._watcher.join(PARTING_SECONDS)
"""

MODES = (contract("train and eval mode", "dml"),)

FAULTS = {
    # A step and its schedule
    "gradients added up over steps": (
        ((STEP, "            optimizer.zero_grad()\n", "            pass\n"),),
        (reference("ffsd"),),
    ),
    "milestones a step late": (
        ((SCHEDULE, "step >= round", "step > round"),),
        (invariant("3_learning_rates_warm_up_per_step_and_fall_at_the_milestones"),),
        "baseline,independent",
    ),
    "milestones an epoch late": (
        ((SCHEDULE, "round(milestone * steps", "round((milestone + 1) * steps"),),
        (invariant("3_learning_rates_warm_up_per_step_and_fall_at_the_milestones"),),
        "baseline,independent",
    ),
    "warm-up from zero": (
        ((SCHEDULE, "return (step + 1) / warmup_steps", "return step / warmup_steps"),),
        (invariant("3_learning_rates_warm_up_per_step_and_fall_at_the_milestones"),),
    ),
    "weight decay 5e-4 for 1e-4": (
        ((OPTIMIZERS, "recipe.weight_decay if", "5 * recipe.weight_decay if"),),
        ("test_engine.py::test_ffsd_trains_its_modules_as_its_authors_did", reference("one")),
        "baseline,cl_ilr",
    ),
    "no Nesterov momentum": (
        ((OPTIMIZERS, "nesterov=recipe.nesterov", "nesterov=False"),),
        ("test_engine.py::test_ffsd_trains_its_modules_as_its_authors_did", reference("one")),
        "baseline,independent",
    ),
    # Data, and what makes runs of a seed paired
    "augmentation lost": (
        ((BATCHES, "randint(0, 2 * self.padding +", "randint(self.padding, self.padding +"),),
        (batches("every_crop_and_both_directions_occur_independently_of_each_other"),),
        "baseline,independent",
    ),
    "an order that depends on the number of views": (
        ((BATCHES, "epoch_order(self.seed, epoch,", "epoch_order(self.seed + self.views, epoch,"),),
        (
            batches("order_and_view_0_are_the_same_whatever_the_number_of_views"),
            invariant("1_all_methods_see_the_same_images_at_the_same_learning_rates"),
        ),
    ),
    "weights that depend on the cohort": (
        (("kdbench/method.py", '"weights", index)', '"weights", index + self.size)'),),
        (
            invariant("2_network_i_starts_from_the_same_weights_in_all_methods"),
            invariant("2_the_student_of_independent_equals_the_baseline_exactly"),
        ),
    ),
    "each process trains on the first share of a batch": (
        ((BATCHES, "slice(rank * share, (rank + 1) * share)", "slice(0, share)"),),
        (batches("the_slices_of_all_processes_make_the_global_batch"),),
    ),
    # Evaluation
    "eval mode left on": (
        (
            (EVALUATE, "    method.train()\n", ""),
            (
                RUN,
                "self.method.train()\n            self.method.begin_epoch",
                "self.method.begin_epoch",
            ),
        ),
        MODES,
        "dml",
    ),
    "evaluation in train mode": (
        ((EVALUATE, "    method.eval()\n", ""),),
        MODES,
    ),
    "the incomplete last batch left out of evaluation": (
        ((BATCHES, " in pairs:", " in (p for p in pairs if len(p[1]) == self.batch_size):"),),
        (
            batches("evaluation_shows_each_image_once_and_only_normalises"),
            invariant("5_evaluation_of_a_run_covers_the_test_set"),
        ),
    ),
    "labels smoothed in evaluation": (
        ((EVALUATE, 'reduction="sum", ignore', 'reduction="sum", label_smoothing=0.1, ignore'),),
        (invariant("5_every_image_counts_once_also_in_the_incomplete_last_batch"),),
    ),
    "ensemble of logits": (
        ((LOSSES, "torch.logsumexp(stacked, dim=0) - math.log(len(logits))", "stacked.mean(0)"),),
        (invariant("7_the_ensemble_is_the_argmax_of_mean_probabilities"),),
        "independent",
    ),
    "best epoch for the last": (
        ((RUN, "self.history[-1].metrics if", "best_on_test(self.history).metrics if"),),
        (invariant("6_the_headline_is_the_last_epoch_and_the_best_is_kept_apart"),),
    ),
    "standard deviation with ddof 0": (
        ((SUMMARY, "accuracies.std(ddof=1)", "accuracies.std(ddof=0)"),),
        ("test_report.py::test_mean_and_sample_deviation_over_seeds",),
    ),
    "residual variance divided by the number of runs": (
        (("kdbench/report/analysis/inference.py", "residuals) / df", "residuals) / len(y)"),),
        ("test_inference.py::test_complete_data_give_paired_means_and_the_pooled_variance",),
    ),
    # What is kept
    "state of the optimizers not restored": (
        ((CHECKPOINT, OPTIMIZER_STATE, "        pass"),),
        (invariant("8_a_killed_run_ends_with_the_same_numbers[ffsd]"),),
    ),
    "random state not restored amid an epoch": (
        ((PART, "            set_random_state(share.noise)\n", ""),),
        (invariant("8_a_run_stopped_in_mid_epoch_ends_with_the_same_numbers[./drawing.py]"),),
    ),
    "each process's own buffers not restored amid an epoch": (
        ((PART, "                buffer.copy_(share.buffers[name])\n", "                pass\n"),),
        (
            "test_processes.py::test_8_two_processes_resume_within_an_epoch_with_equal_numbers"
            "[killed-baseline]",
        ),
    ),
    "checkpoints not compared with their checksum": (
        ((CHECKPOINT, "hashlib.sha256(content).digest() != checksum", "False"),),
        (invariant("8_the_intact_one_of_two_checkpoints_is_used"),),
    ),
    "a checkpoint holds what training came to while it was written": (
        ((CHECKPOINT, 'tensor.to("cpu", copy=True)', 'tensor.to("cpu")'),),
        (invariant("8_a_checkpoint_is_a_snapshot_although_training_continues"),),
    ),
    "a stopped process does not wait for the one that writes the checkpoint": (
        ((RUN, "self.accelerator.wait_for_everyone()\n                    raise", "raise"),),
        ("test_launchers.py::test_two_processes_stop_after_a_step_and_resume[15-143-5]",),
    ),
    "a process ends beside its watcher": (
        ((RANKS, UNWATCH, "        pass\n"),),
        ("test_nodes.py::test_watched_processes_keep_their_exit_codes[2]",),
    ),
    "rows of several precisions are compared": (
        ((VERDICTS, "enumerate(frame.kind == kind) if same]", "enumerate(frame.kind == kind)]"),),
        ("test_report.py::test_runs_of_different_precisions_are_not_compared",),
    ),
}
