"""The errors that users cause: a sentence, exit code 2, no traceback."""


class InputError(ValueError):
    """Names the file, tensor or option, what was expected and what was found.

    The command line prints the message and exits with code 2. Library users catch it as a
    `ValueError`.
    """


class NotFiniteError(InputError, ArithmeticError):
    """A model that computes NaN or infinity, which weights or settings of no model in order do."""
