"""The `perseid` command: serve, generate, adapters, inspect. Each is one file, imported only when it runs."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, Parameter
from cyclopts.config import Env, Toml

from perseid_server import __version__
from perseid_server.errors import PerseidError

app = App(
    name="perseid",
    help="One frozen 4-bit base model, any number of hot-swapped LoRA adapters, one batch.",
    version=__version__,
)
app.command("perseid_server.cli.serve:serve")
app.command("perseid_server.cli.generate:generate")
app.command("perseid_server.cli.adapters:adapters")
app.command("perseid_server.cli.inspect:inspect")


@app.meta.default
def _with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(env_var="PERSEID_CONFIG")] = None,
) -> object:
    """Read options from the command line, then PERSEID_* variables, then a file.

    Parameters
    ----------
    config
        TOML file with a table per command, e.g. [serve] with http-port = 8000.
    """
    file = [Toml(config, must_exist=True)] if config else []
    app.config = (Env("PERSEID_", command=False), *file)
    return app(tokens)


def main() -> NoReturn:
    """Run the command line; an error meant for the user is one line on stderr and exit status 1."""
    try:
        result = app.meta(result_action="return_value")
    except PerseidError as error:
        print(f"perseid: {error.message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)
