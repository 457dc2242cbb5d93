"""Frozen linear layer plus a low-rank update that shares CP factors with other layers."""
