"""Backends in plain torch: every dtype and device, explicit backward, no speed claims."""
