"""`engine fetch`: a model from where it is to here."""

from engine.commands import common


def fetch(model: common.ModelArgument = common.DEFAULT_MODEL) -> None:
    """Download a model, unless it is here already, and print where it lies."""
    from engine.checkpoint.locate import locate

    print(locate(model))
