"""`engine fetch`: a model from where it is to here."""

from engine.commands import common


def fetch(model: common.ModelArgument = common.DEFAULT_MODEL) -> None:
    """Download a model if it is not here yet, and print its path."""
    from engine.checkpoint.locate import locate

    print(locate(model))
