"""The exception tree, standard library only so that both halves share it.

::

    TriptychError
    ├── UsageError              an option, a name or a value the caller can mend
    │   ├── PipelineError       a pipeline text that does not parse, or passes in an impossible order
    │   └── RecipeError         a recipe that a layer or a target cannot take
    ├── ModelError              a model that cannot be loaded, described or captured
    ├── VerificationError       a program that is not well formed, or a pass that broke its promise
    ├── LoweringError           a target could not emit a program
    ├── ArtifactError           an artifact or manifest that is missing, broken or of another version
    └── RunError                a run that cannot go on: bad image, prompt past the context, wrong input

Every message says what was wrong, its value, what was expected and what to do next, on one line.
"""


class TriptychError(Exception):
    """Base of every error raised on purpose by this package."""


class UsageError(TriptychError):
    """An option, a name or a value that the caller can mend."""


class PipelineError(UsageError):
    """A pipeline text that does not parse, or passes in an impossible order."""


class RecipeError(UsageError):
    """A recipe that a layer or a target cannot take."""


class ModelError(TriptychError):
    """A model that cannot be loaded, described or captured."""


class VerificationError(TriptychError):
    """A program that is not well formed, or a pass that broke its promise.

    `method` and `place` (a layer, a node) say where, as far as that is known.
    """

    def __init__(self, message: str, *, method: str | None = None, place: str | None = None) -> None:
        super().__init__(message)
        self.method = method
        self.place = place


class LoweringError(TriptychError):
    """A target could not emit a program."""


class ArtifactError(TriptychError):
    """An artifact or manifest that is missing, broken or of another version."""


class RunError(TriptychError):
    """A run that cannot go on: a bad image, a prompt past the context, a wrong input."""
