"""PILL: modality experts, an attention adapter and value gates in a frozen language model."""
