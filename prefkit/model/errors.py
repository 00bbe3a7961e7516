"""The error of everything that has to do with a model."""

from prefkit.config.errors import UserError


class ModelError(UserError):
    """A model or adapter that cannot be used; the message says which, why and what to do."""
