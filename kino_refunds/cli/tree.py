"""The command tree: every command, its block in the help, and the function that it calls.

A module is imported when one of its commands is named, so that help, completion and usage errors load little.
"""

from __future__ import annotations

from collections import UserDict
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Group(NamedTuple):
    """A noun and its verbs."""

    help: str
    commands: Mapping[str, str]
    """By verb: the module of this package and the function in it."""


BLOCKS: Final[Mapping[str, Mapping[str, str | Group]]] = {
    "LOOK": {
        "status": "status:status",
        "doctor": "doctor:doctor",
        "why": "why:why",
        "schedule": "schedule:schedule",
    },
    "LETTERS": {
        "dead-letters": Group(
            "Messages that no worker could settle.\n\nExample: kino-refunds dead-letters list",
            {
                "list": "dead_letters:list_letters",
                "show": "dead_letters:show",
                "replay": "dead_letters:replay",
                "discard": "dead_letters:discard",
                "note": "dead_letters:note",
            },
        ),
        "retries": Group(
            "Events that wait for another try.\n\nExample: kino-refunds retries list",
            {"list": "retries:list_pending", "show": "retries:show", "run-now": "retries:run_now"},
        ),
        "breaks": Group(
            "What disagrees with the ledger.\n\nExample: kino-refunds breaks list",
            {
                "list": "breaks:list_breaks",
                "show": "breaks:show",
                "repair": "breaks:repair",
                "accept": "breaks:accept",
                "false-alarm": "breaks:false_alarm",
                "note": "breaks:note",
                "assign": "breaks:assign",
            },
        ),
    },
    "INTAKE": {
        "intake": Group(
            "Whether workers take events from the queues.\n\nExample: kino-refunds intake status",
            {"status": "intake:status", "pause": "intake:pause", "resume": "intake:resume"},
        ),
    },
    "PROVE": {
        "reconcile": Group(
            "Whether ledger, pipeline and policy agree.\n\nExample: kino-refunds reconcile list",
            {
                "list": "reconcile:list_checks",
                "run": "reconcile:run",
                "show": "reconcile:show",
                "prove": "reconcile:prove",
                "checks": "reconcile:checks",
                "check-source": "reconcile:check_source",
            },
        ),
        "report": Group(
            "Credits by month, and what can still be spent.\n\nExample: kino-refunds report month 2026-01",
            {"month": "report:month", "liability": "report:liability"},
        ),
    },
    "LEDGER": {
        "accounts": Group(
            "What accounts have, and the transfers behind it.\n\nExample: kino-refunds accounts show acme",
            {"show": "accounts:show", "statement": "accounts:statement", "grant": "accounts:grant"},
        ),
        "charges": Group(
            "What jobs took from their accounts.\n\nExample: kino-refunds charges list --open",
            {"list": "charges:list_charges", "open": "charges:open_charge", "ask": "ask:ask"},
        ),
    },
    "RUN": {
        "migrate": "migrate:migrate",
        "dev": "dev:dev",
        "demo": "demo:demo",
        "trace": Group(
            "Run recorded jobs through a real worker.\n\nExample: kino-refunds trace run gentd26-first60.csv",
            {"run": "trace:run"},
        ),
        "publish": "publish:publish",
        "relay": Group(
            "News of refunds for the product.\n\n"
            "Example: kino-refunds relay rewind --to 2026-01-31T12:00:00Z --dry-run",
            {"rewind": "relay:rewind"},
        ),
    },
}
ALIASES: Final[Mapping[str, str | Group]] = {
    "grant": "accounts:grant",
    "balance": "accounts:show",
    "statement": "accounts:statement",
    "overdue": Group(
        "Jobs past their deadline that nothing has settled.\n\nExample: kino-refunds charges ask --dry-run",
        {"run": "ask:ask"},
    ),
    "replay-trace": "trace:run",
}
"""Names of the release before, kept for one release: no help and no suggestion shows them."""
VISIBLE: Final = {name: place for block in BLOCKS.values() for name, place in block.items()}


def command_words(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line that name its command: ids and texts behind them may be anything."""
    if not arguments:
        return []
    place = VISIBLE.get(arguments[0]) or ALIASES.get(arguments[0])
    if place is None:
        return []
    verbs = place.commands if isinstance(place, Group) else ()
    return [*arguments[:1], *(word for word in arguments[1:2] if word in verbs)]


class _Commands(UserDict[str, Any]):
    """The commands of a group by name; each is made when it is first asked for, and not before."""

    def __getitem__(self, name: str) -> Any:
        place = self.data[name]
        if isinstance(place, Group):
            self.data[name] = _Branch(
                name=name,
                commands=_Commands(place.commands),  # type: ignore[arg-type]  # the type hint says dict, a mapping does
                help=place.help,
                no_args_is_help=True,
                rich_markup_mode=None,
            )
        elif isinstance(place, str):
            self.data[name] = _leaf(name, place)
        return self.data[name]


def _leaf(name: str, place: str) -> Any:
    module, _, function = place.partition(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=_Leaf)(getattr(import_module(f"{__package__}.{module}"), function))
    return typer.main.get_command(app)


class _Leaf(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        """Run the command, and before it what the caller wants done once the arguments are known to be right."""
        if callable(ctx.obj):
            ctx.obj()
        return super().invoke(ctx)


class _Branch(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        """Return the options that stand before the verb: typer's own, such as `--help`.

        An option that is not given is None, and typer loads pydantic to read that; False it takes as it is. This saves
        half of the time of a usage error.
        """
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_bool_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """List the names without making the commands."""
        return list(self.commands)


class Root(_Branch):
    """The whole tree; its help shows the blocks, and old names are found and not shown."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes | {"commands": _Commands(VISIBLE)})
        self._aliases = _Commands(ALIASES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, also by the name that it had before; None if there is none."""
        return super().get_command(ctx, cmd_name) or self._aliases.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each block, with a line for each command and the lines of all sections aligned."""
        width = max(map(len, VISIBLE))
        for block, names in BLOCKS.items():
            commands = {name: super(Root, self).get_command(ctx, name) for name in names}
            with formatter.section(block):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(formatter.width - width - 6))
                        for name, command in commands.items()
                        if command is not None
                    ]
                )
