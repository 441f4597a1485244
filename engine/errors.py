"""The errors that users cause: a sentence, exit code 2, no traceback."""

from collections.abc import Hashable, Iterable


class InputError(ValueError):
    """Names the file, tensor or option, what was expected and what was found.

    The command line prints the message and exits with code 2. Library users catch it as a
    `ValueError`.
    """


class NotFiniteError(InputError, ArithmeticError):
    """A model that computes NaN or infinity, which weights or settings of no model in order do."""


def check_choice(name: str, found: object, known: Iterable[object]) -> None:
    """InputError where what was `found` for an option is none of those that are `known`."""
    known = tuple(known)
    if not isinstance(found, Hashable) or found not in known:  # an array compares its values
        raise InputError(f"{name}: expected one of {', '.join(map(str, known))}, found {found!r}")
