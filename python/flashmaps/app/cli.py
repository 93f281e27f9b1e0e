"""The entry point of the command line; the commands are in flashmaps.app.commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the arguments name.

    A user's mistake prints what to mend and exits with 2, without a traceback.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"flashmaps: the command line needs more packages ({error}); "
            "install them with: pip install 'flashmaps[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    from flashmaps.app.commands import make_app

    make_app()()


if __name__ == "__main__":
    main()
