"""`engine push`: a model to the Hugging Face hub, with a card of how it was made."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common, output
from engine.commands.compare import read
from engine.errors import InputError


def push(
    model: Annotated[Path, typer.Argument(help="A directory or a .gguf file.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub; created if missing.")],
    plan: common.PlanFile = None,
    record: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Records of `engine eval --json`: the unpruned model's first, this one's last.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Source model, if no record names it.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Licence. Default: the source's.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    card_only: Annotated[
        bool, typer.Option("--card", help="Print the model card; push nothing.")
    ] = False,
) -> None:
    """Push a model to the Hugging Face hub in one commit, with a card made from its records."""
    from engine.export.card import card, gather

    if not model.exists():
        raise InputError(f"{model}: expected a directory or a .gguf file")
    records = [read(file) for file in record or ()]
    made = gather(model, plan=plan, records=records, source=source, licence=licence)
    text = card(made, repo)
    if card_only:
        print(text, end="")
        return
    upload(model, repo, text, private)
    output.say(f"{repo}: {made.layers} layers, {made.nbytes / 1e6:,.1f} MB")


def upload(model: Path, repo: str, text: str, private: bool) -> None:
    """One commit, which is there whole or not at all. InputError for what the hub says."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, errors

    from engine.checkpoint.locate import hub_refused
    from engine.scratch import MARKER

    files = sorted(model.glob("[!.]*")) if model.is_dir() else [model]
    adds = [
        CommitOperationAdd(path.name, str(path))
        for path in files
        if path.is_file() and path.name not in ("README.md", MARKER)  # which a kill may leave
    ]
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the owner has it
        api.create_commit(
            repo,
            [*adds, CommitOperationAdd("README.md", text.encode())],
            commit_message="Upload a shallower model",
        )
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"{repo}: log in with `hf auth login` first") from error
    except (errors.HTTPError, OSError, ValueError) as error:
        raise hub_refused(repo, error) from error
