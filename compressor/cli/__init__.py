"""The command line: one module per command, loaded when called; `main` ends every way in an exit code."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

import click

from compressor.cli.packages import misplaced_package, shadowed_text

COMMANDS = ("run", "compare", "validate", "export", "inspect", "bench")


def one_dash(token: str) -> str:
    """The token with ``-`` for every ``_``, so that both spellings of an option are the same."""
    return token.replace("_", "-")


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a user's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of the module with its name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"compressor.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names, or a usage error that lists them."""
        if args and one_dash(args[0]) not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; there are {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from compressor import __version__

        click.echo(f"blockpress {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": one_dash},
    epilog="Exit codes: 0 passed · 1 our bug · 2 usage · 3 input refused · 4 a gate failed · 5 resources · "
    "6 output exists or is locked · 7 hub or network · 75 stopped safely · 130/143 stopped at once.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def group() -> None:
    """Turn a language model into a sparse ONNX model that is smaller and proven right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line. Prints; never raises."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without the sign gets a question mark, not a crash
    foreign = misplaced_package()
    if foreign is not None:
        _print_shadowed(foreign, as_json="--json" in tokens)
        return 2
    from compressor.cli.terminal import stdout_of_its_own

    with stdout_of_its_own():
        return _end(tokens)


def _print_shadowed(package: str, *, as_json: bool) -> None:
    """The error in the form of all others; ``failures`` cannot be loaded, as it needs the hidden package."""
    error_id, message, remedy = shadowed_text(package)
    if as_json:
        print(json.dumps({"error": {"id": error_id, "message": message, "remedy": remedy, "exit_code": 2}}))
    else:
        print(f"{error_id}  {message}\n  do this: {remedy}", file=sys.stderr)


def _end(tokens: list[str]) -> int:
    """Run the command and turn whatever comes of it into an exit code."""
    from compressor.cli.failures import describe_failure, print_failure
    from compressor.cli.terminal import discard_stdout
    from compressor.run.launch import may_tell

    try:
        code = _invoke(tokens)
    except BrokenPipeError:
        code = 0  # the reader of stdout has seen enough
    except BaseException as error:
        failure = describe_failure(error)
        code = failure.exit_code
        if may_tell(error):
            print_failure(failure, as_json="--json" in tokens)
    finally:
        if "compressor.run.logs" in sys.modules:
            sys.modules["compressor.run.logs"].remove_log_file()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    return code


def _invoke(tokens: list[str]) -> int:
    """Run the command; ``Group.main`` would turn signals into something else."""
    if not tokens:
        click.echo(group.get_help(click.Context(group, info_name="compress")))
        return 2
    try:
        with group.make_context("compress", tokens) as ctx:
            code = group.invoke(ctx)
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    return code if isinstance(code, int) else 0
