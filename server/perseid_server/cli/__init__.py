"""The `perseid` command: serve, generate, adapters, inspect, train, loadtest. Each is imported only when it
runs."""

import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env, Toml
from rich.console import Console
from rich.text import Text

from perseid_server import __version__
from perseid_server.errors import PerseidError

SERVE = """Serve a base model and its adapters over gRPC and HTTP.

Every option can also be given as a variable (PERSEID_HTTP_PORT=8001) or in a file (perseid --config FILE serve).
"""
INSPECT = """Tell what a model, adapter or gate set holds, and whether it would be accepted.

Exit status 1 when it would not.
"""
LOADTEST = """Drive a server with traffic and measure it, over gRPC or any OpenAI-compatible HTTP API.

Latencies count from when a request was due. Ctrl-C ends the run and still reports.
"""


def _one_line(error: CycloptsError) -> Text:
    """Plain: what users typed may look like markup."""
    return Text(f"perseid: {' '.join(str(error).split())}")


app = App(
    name="perseid",
    help="One frozen 4-bit base model, any number of hot-swapped LoRA adapters, one batch.",
    version=__version__,
    error_formatter=_one_line,
    error_console=Console(stderr=True, soft_wrap=True),
)
# Said here, so that listing the commands need not import them.
app.command("perseid_server.cli.serve:serve", help=SERVE)
app.command("perseid_server.cli.generate:generate", help="Generate text with a running server.")
app.command(
    "perseid_server.cli.adapters:adapters",
    help="Load, unload and look at the adapters and gate sets of a running server.",
)
app.command("perseid_server.cli.inspect:inspect", help=INSPECT)
app.command("perseid_server.cli.keys:keys", help="Make, list and revoke API keys.")
app.command("perseid_server.cli.train:train", help="Train gates that choose among your adapters.")
app.command("perseid_loadtest.command:loadtest", help=LOADTEST)


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
    if config is not None:
        _check_file(config)
    file = [Toml(config, must_exist=True)] if config else []
    app.config = (Env("PERSEID_", command=False), *file)
    return app(tokens)


def _check_file(path: Path) -> None:
    try:
        tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PerseidError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PerseidError(f"--config {path}: not a TOML file: {error}") from error


def main() -> NoReturn:
    """Run the command line. An error meant for the user is one line on stderr: exit status 2 for options that cannot
    be read, 1 for what goes wrong with them."""
    try:
        result = app.meta(sys.argv[1:], result_action="return_value")
    except PerseidError as error:
        print(f"perseid: {error.message}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has left, as `head` does; what is buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else 0)
