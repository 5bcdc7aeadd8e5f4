"""The catalogue: every rule once. A new one is a function in this room, a line here, and a page in `pages/`."""

from __future__ import annotations

from bifusion_diag.diagnosis.findings import Rule
from bifusion_diag.diagnosis.rules.bad_steps import gradient_spike, nonfinite_gradient, nonfinite_loss
from bifusion_diag.diagnosis.rules.clip import alignment_collapse, clip_leak, clip_out_of_range, scale_mismatch
from bifusion_diag.diagnosis.rules.counts import (
    attention_masked_rows,
    data_nonfinite,
    empty_matches,
    labels_out_of_range,
    nonfinite_output,
)
from bifusion_diag.diagnosis.rules.data import data_range
from bifusion_diag.diagnosis.rules.drift import drifting_gradients
from bifusion_diag.diagnosis.rules.flow import declared_vs_measured_flow, temperature_gain
from bifusion_diag.diagnosis.rules.gate import alpha_out_of_band, alpha_stuck, gate_saturated
from bifusion_diag.diagnosis.rules.incidents import incident_findings
from bifusion_diag.diagnosis.rules.inside import dead_units, exploding_module, nonfinite_weight, vanishing_gradients
from bifusion_diag.diagnosis.rules.learning import loss_divergence, nothing_learned
from bifusion_diag.diagnosis.rules.normalisation import near_zero_norm
from bifusion_diag.diagnosis.rules.optimiser import amp_scale_collapse, clipping_always_on, update_ratio_off
from bifusion_diag.diagnosis.rules.projection import augmentation_not_undone, low_valid_share, projection_nonfinite
from bifusion_diag.diagnosis.rules.schedule import schedule_fights_warm_up
from bifusion_diag.diagnosis.rules.terms import conflicting_terms, dominant_term
from bifusion_diag.diagnosis.rules.weights_of_losses import background_weight, loss_weights_vs_baseline

RULES: tuple[Rule, ...] = (
    Rule("incident", "Bad steps taken apart", incident_findings),
    # bad steps
    Rule("nonfinite-loss", "Non-finite loss", nonfinite_loss, ("losses",)),
    Rule("nonfinite-gradient", "Non-finite gradient", nonfinite_gradient, ("grads",)),
    Rule("nonfinite-weight", "Non-finite weights", nonfinite_weight, ("weights",)),
    Rule("gradient-spike", "Spikes of the gradient norm", gradient_spike, ("grads",)),
    # the long run
    Rule("loss-divergence", "The loss diverges", loss_divergence, ("losses",)),
    Rule("nothing-learned", "Nothing learned", nothing_learned, ("losses",)),
    Rule("drifting-gradients", "Gradients drift upwards", drifting_gradients, ("grads",)),
    # inside the model
    Rule("nonfinite-output", "Non-finite output of a module", nonfinite_output, ("activations",)),
    Rule("exploding-module", "A module explodes", exploding_module, ("grads", "activations")),
    Rule("vanishing-gradients", "Gradients vanish", vanishing_gradients, ("grads",)),
    Rule("dead-units", "Dead units", dead_units, ("activations",)),
    Rule("attention-masked-rows", "Attention rows without a key", attention_masked_rows, ("attention",)),
    Rule("empty-match", "Scenes without a matched query", empty_matches, ("matching",)),
    # data
    Rule("labels-out-of-range", "Labels out of range", labels_out_of_range, ("data",)),
    Rule("data-nonfinite", "Non-finite data", data_nonfinite, ("data",)),
    Rule("data-range", "Data out of range", data_range, ("data",)),
    Rule("projection-nonfinite", "Non-finite projection", projection_nonfinite, ("projection",)),
    Rule("low-valid-share", "Low valid share", low_valid_share, ("projection",)),
    Rule("augmentation-not-undone", "Augmentation not undone", augmentation_not_undone, ("projection",)),
    # optimiser
    Rule("clipping-always-on", "Clipping always on", clipping_always_on),
    Rule("update-ratio-off", "Updates too long or too short", update_ratio_off, ("updates",)),
    Rule("amp-scale-collapse", "The GradScaler's scale collapses", amp_scale_collapse, ("updates",)),
    # the fusion
    Rule("alpha-out-of-band", "Mean α outside its band", alpha_out_of_band, ("gate",)),
    Rule("alpha-stuck", "α stuck after the warm-up", alpha_stuck, ("gate",)),
    Rule("gate-saturated", "Gate saturated", gate_saturated, ("gate",)),
    Rule("clip-out-of-range", "CLIP features out of range", clip_out_of_range, ("clip",)),
    Rule("scale-mismatch", "2D and 3D features differ in scale", scale_mismatch, ("clip",)),
    Rule("alignment-collapse", "Features collapse under the alignment loss", alignment_collapse, ("clip",)),
    Rule("clip-leak", "What is frozen changes", clip_leak, ("grads", "weights")),
    Rule("declared-vs-measured-flow", "Gradient flow other than declared", declared_vs_measured_flow, ("flow",)),
    Rule("temperature-gain", "Gain of the temperature", temperature_gain, ("flow", "loss_gradients")),
    Rule("near-zero-norm", "Normalisation of vectors of no length", near_zero_norm, ("normalize",)),
    # loss terms
    Rule("dominant-term", "One term dominates", dominant_term, ("losses", "loss_gradients")),
    Rule("conflicting-terms", "Terms in conflict", conflicting_terms, ("loss_gradients",)),
    Rule("background-weight", "Weight of the background", background_weight, ("matching",)),
    Rule("loss-weights-vs-baseline", "Weights of the losses and the baseline's", loss_weights_vs_baseline),
    # the schedule
    Rule("schedule-fights-warm-up", "Schedule fights warm-up", schedule_fights_warm_up),
)
