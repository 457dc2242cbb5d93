"""CROME's adapter as a PEFT method."""
