"""The services as commands: `python db_cli.py --help`. Exit codes: 0 done, 1 failed, 2 refused."""

import gc

# What is imported stays: looking for garbage among it takes a fifth of the start.
gc.disable()

import sys
from http import HTTPStatus

import typer

from backend.cli import (
    FAILED,
    REFUSED,
    accounts,
    audit,
    backups,
    data,
    erasures,
    keys,
    maps,
    retention,
    samples,
)
from backend.errors import ConfigurationError, HoldfastError
from backend.logs import configure_logs, where
from backend.settings import get_settings

gc.freeze()
gc.enable()

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    # They print local variables, which are people's data and keys.
    pretty_exceptions_enable=False,
)
# In the order that the help shows: first the commands without a noun, then the nouns.
for part in (accounts, samples, data, erasures):
    app.registered_commands += part.app.registered_commands
app.add_typer(erasures.certificate_app, name="certificate")
app.add_typer(retention.app, name="retention")
app.add_typer(maps.app, name="map")
app.add_typer(audit.app, name="audit")
app.add_typer(backups.app, name="backup")
app.add_typer(keys.app, name="keys")


def main() -> int:
    """Run one command; a refusal is one line on stderr and exit code 2."""
    try:
        configure_logs(get_settings())
        # Alone, it would print boxes around what it refuses, and end the process itself.
        return int(app(standalone_mode=False) or 0)
    except typer.TyperException as err:
        # What asks for help was given it, and has no words.
        if words := " ".join(err.format_message().split()):
            print(f"holdfast: {words}", file=sys.stderr)
        return REFUSED
    except typer.Abort:
        print("holdfast: aborted", file=sys.stderr)
        return FAILED
    except HoldfastError as err:
        print(f"holdfast: {err.detail}", file=sys.stderr)
        failed = err.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return FAILED if failed and not isinstance(err, ConfigurationError) else REFUSED
    except OSError as err:
        print(f"holdfast: {err.strerror}: {err.filename}", file=sys.stderr)
        return REFUSED
    except Exception as err:  # noqa: BLE001 - the edge: its words may quote a row, its class does not
        print(f"holdfast: failed: {type(err).__name__} at {where(err)}", file=sys.stderr)
        return FAILED
    finally:
        # The end of the process frees it all at once.
        gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
