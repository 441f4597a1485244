"""The `engine` program: an interrupt is watched for before anything that takes time is imported."""

from engine.commands import interrupt


def main() -> None:
    interrupt.watch()
    from engine.cli import main as run

    run()


if __name__ == "__main__":
    main()
