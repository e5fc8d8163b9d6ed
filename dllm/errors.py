"""The errors a user can meet, by what is at fault.

Each carries one line that says what is wrong and where, and one that says what to do. The command line prints
them and exits with the class's code; a traceback appears only with --debug.
"""

from dllm.outside import MAX_LINE, one_line
from dllm.secrets import hide

LONGEST_PLACE, LONGEST_HINT = 150, 200
"""Characters of place and hint in a line that is cut to MAX_LINE; the message has the rest."""


class DllmError(Exception):
    """A failure the user can act on; secrets in its texts are hidden.

    Args:
        message: what is wrong and what was expected, in one line.
        where: the file, key or address at fault, or None.
        hint: what to do about it, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = hide(message)
        self.where, self.hint = (text if text is None else hide(text) for text in (where, hint))
        super().__init__(self.message)

    def __str__(self) -> str:
        """Return one line without control characters, of at most MAX_LINE characters."""
        line = self._line(self.message, self.where, self.hint)
        if len(line) <= MAX_LINE:
            return line
        where = None if self.where is None else one_line(self.where, LONGEST_PLACE)
        hint = None if self.hint is None else one_line(self.hint, LONGEST_HINT)
        rest = MAX_LINE + 1 - len(self._line("m", where, hint))
        return self._line(one_line(self.message, rest), where, hint)

    @staticmethod
    def _line(message: str, where: str | None, hint: str | None) -> str:
        line = message if where is None else f"{message} ({where})"
        return one_line(line if hint is None else f"{line}; {hint}")


class ConfigError(DllmError):
    """A parameter is unknown, of the wrong type, or impossible beside another."""

    exit_code = 2


class DataError(DllmError):
    """Prompts, shards or features cannot be read, or hold nothing to train on."""

    exit_code = 3


class ServerError(DllmError):
    """A server (engine, MLflow, Prefect) cannot be reached or responds wrongly."""

    exit_code = 4


class StageError(DllmError):
    """A stage cannot continue: its input is missing, the disk is full, its child failed."""

    exit_code = 5


class ModelError(DllmError):
    """A model or checkpoint is missing, incomplete, or incompatible with its target."""

    exit_code = 6
