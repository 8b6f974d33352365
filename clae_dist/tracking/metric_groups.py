"""Names of metrics on a tracking page, grouped by the word before a slash: train/loss, eval/knn_accuracy."""

from __future__ import annotations

_GROUPS = {
    "train": "step epoch time_s loss loss_clean loss_adversarial grad_norm loss_step loss_clean_step loss_adversarial_step "
    "grad_norm_step learning_rate bad_samples skipped_steps",
    "attack": "delta_linf delta_l2 attack_loss_before delta_linf_mean delta_l2_mean attack_loss_before_mean "
    "attack_loss_after attack_loss_noise wrong_sign_share zero_gradient_share cos_positive_adversarial "
    "cos_negative_mean_adversarial cos_negative_hardest_adversarial",
    "embedding": "cos_positive cos_negative_mean cos_negative_hardest alignment uniformity rank_me",
    "alarm": "alarm_collapse alarm_useless_attack alarm_masked_attack",
    "eval": "knn_accuracy knn_accuracy_low knn_accuracy_high linear_accuracy linear_accuracy_low linear_accuracy_high "
    "accuracy accuracy_low accuracy_high accuracy_many accuracy_medium accuracy_few "
    "target_accuracy target_accuracy_low target_accuracy_high domain_distance",
    "speed": "images_per_s data_wait_share augmentation_share forward_share attack_share backward_share update_share "
    "diagnosis_share checkpoint_share mfu peak_memory_gib checkpoint_blocked_s slow_rank slow_share",
    "goodput": "goodput goodput_starting_share goodput_data_share goodput_checkpoint_share goodput_evaluation_share "
    "goodput_lost_share goodput_idle_share",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}

DESCRIPTION = """\
**Steps are images:** the step of every metric is the number of images that training had seen (`train/step` has the number of
optimiser steps). Shares and accuracies are percent. Losses and the gradient norm are means of the steps since the last value,
with `…_step` for a single step; other values are of a single step, with `…_mean` for the mean.

| group | metrics |
|---|---|
| `train/` | losses of the global batch, gradient norm, learning rate |
| `attack/` | of the adversarial view: size of δ, loss before, after and under noise, zero gradients, cosines |
| `embedding/` | cosines, alignment, uniformity and effective rank of the clean views |
| `alarm/` | 1 while a collapse or an attack without effect is seen; tags have the cause |
| `eval/` | kNN during training; every protocol before and after |
| `speed/` | images/s, waits, shares of a step's phases, MFU (against the GPU's peak), peak memory, a slow rank and its price |
| `goodput/` | where the wall time went |
"""


def grouped(name: str) -> str:
    """The name of a metric on a tracking page; results before and after pretraining are in `eval/`."""
    default = "eval" if name.endswith(("_before", "_after")) else "train"
    return f"{_GROUP_OF.get(name, default)}/{name}"
