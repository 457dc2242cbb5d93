"""Per-head tanh gate on the attention values of one modality's tokens."""
