"""Training CROME: schedule, stage weights, how a recipe becomes a model, evaluation, ablations."""
