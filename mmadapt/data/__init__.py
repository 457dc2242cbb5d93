"""Readers, prompts and the embedded digits-vqa set."""
