"""Errors a user can act on; the command line prints them without a traceback."""

from __future__ import annotations


class MMAdaptError(Exception):
    """Base of the errors below: the message says what came and what was expected."""


class RecipeError(MMAdaptError, ValueError):
    """A recipe or an override that cannot be used."""


class RunError(MMAdaptError, RuntimeError):
    """A run directory that does not fit the recipe, or state that cannot be resumed."""


class GuardError(MMAdaptError, RuntimeError):
    """Training that would run without doing what the recipe asks for."""
