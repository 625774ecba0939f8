"""Warnings about a run: what its figures do not show."""

OPEN_GATE = 0.8  # share of stored forget prompts below which the gate opens too rarely
LEAK = 0.05  # share of retain samples above which it opens too often
NO_TARGET = 1e-6  # stop_ratio of plain texts: they train for all steps


def shortfalls(metrics: dict) -> list[str]:
    """One warning per weakness of a run, from its metrics.json; [] if there is none."""
    phase_one, config, warnings = metrics["phase_one"], metrics["config"], []
    samples = phase_one.get("samples", {})
    router = phase_one.get("router", {})
    if config["alter"].get("gate") == "bank":
        if (opened := router.get("forget_open_at_answer", 1.0)) < OPEN_GATE:
            warnings.append(
                f"The gate opens on only {opened:.0%} of the forget samples. Where it stays "
                "closed, nothing is forgotten: what to keep is too similar to what to forget. "
                "Method alter acts on every token, but also changes everything else."
            )
        if (opened := router.get("retain_open_anywhere", 0.0)) > LEAK:
            warnings.append(
                f"The gate opens on {opened:.0%} of the retain samples: they are too similar to "
                "what to forget. Add more retain examples of their kind."
            )
    if metrics["stopped"] == "all steps done":
        sentences = []
        if config["training"]["stop_ratio"] > NO_TARGET:
            sentences.append("Training ended before the probe reached its target. Use more steps.")
        drawn = metrics["steps"] * config["training"]["batch_size"]
        if drawn < (forget := samples.get("forget", 0)):
            sentences.append(f"Training used {drawn} of {forget} forget samples.")
        warnings += [" ".join(sentences)] if sentences else []
    used, given = samples.get("retain", 0), samples.get("retain_given", 0)
    if 2 * used < given:
        warnings.append(
            f"Training used {used} of {given} retain samples. More of them (--retain-samples) "
            "take longer and protect more."
        )
    if not metrics.get("held_out", True) and "forget_held_out" in metrics["after"]:
        warnings.append(
            "The forget set has no paraphrased_question, so the held-out forget questions are "
            "those of training. They do not show what happens in other words."
        )
    if not metrics.get("measured", True):
        warnings.append(
            "This run has no figures: measuring was stopped or is not done. To ask the model, run "
            "python -m alter_demo compare."
        )
    return warnings
