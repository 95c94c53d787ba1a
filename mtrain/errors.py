"""Errors for people: each says what was given, what was expected and what to do next."""


class MtrainError(ValueError):
    """Base of every error that a user can mend; the command line prints it as one line, without a traceback."""


class RecipeError(MtrainError):
    """A recipe or an override that cannot be used."""


class DataError(MtrainError):
    """Training data that is missing, empty or corrupt."""


class ModelError(MtrainError):
    """A model that cannot be trained exactly with this attention."""


class CheckpointError(MtrainError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class LaunchError(MtrainError):
    """A launch whose processes do not fit the recipe, or a peer that was lost."""


class EvalError(MtrainError):
    """An evaluation that cannot be made as asked: an unknown task, data that is missing, a length beyond the model."""
