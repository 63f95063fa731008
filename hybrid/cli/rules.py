"""`hybrid rules check|list|show|init`: files that say where tensors go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.machine import add_machine, machine_of
from hybrid.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from hybrid.placement.rules import RuleSet

HELP = "check placement rules, list and show the shipped ones, write a file to start from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check", help="tell what is wrong with a rule file, for a model if one is given", allow_abbrev=False
    )
    check.add_argument("file", metavar="FILE", help="a rule file or a shipped name")
    arguments.flag(check, "-m", "--model", help="a GGUF file to check the rules against; a header will do")
    add_machine(check)
    commands.add_parser("list", help="list the shipped rules", allow_abbrev=False)
    show = commands.add_parser("show", help="print a shipped file", allow_abbrev=False)
    show.add_argument("name", metavar="NAME", help="its name, as list prints it")
    schema = commands.add_parser(
        "schema", help="write the JSON Schema of the language, for editors", allow_abbrev=False
    )
    init = commands.add_parser(
        "init", help="write the plan that auto makes for a model as rules", allow_abbrev=False
    )
    init.add_argument("file", metavar="MODEL", help="a GGUF file, or demo; a header will do")
    for command in (schema, init):
        arguments.flag(command, "-o", "--out", scope="rules", metavar="FILE")
        arguments.flag(command, "-f", "--force", scope="rules")
    arguments.flag(init, "-c", "--ctx-size")
    add_machine(init)


def run(args: argparse.Namespace) -> int:
    actions = {"check": _check, "list": _list, "show": _show, "schema": _schema, "init": _init}
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from hybrid.cli.table import markdown_table
    from hybrid.placement.rules import shipped_names, shipped_text

    rows = [("auto", "without rules: what every token reads on GPUs, experts in RAM")]
    for name in shipped_names():
        first = shipped_text(name).partition("\n")[0]
        rows.append((name, first.removeprefix("#").strip()))
    print(markdown_table(("name", "what it does"), rows))
    return 0


def _show(args: argparse.Namespace) -> int:
    from hybrid.placement.rules import shipped_text

    print(shipped_text(args.name), end="")
    return 0


def _schema(args: argparse.Namespace) -> int:
    from importlib import resources

    text = (resources.files("hybrid.rules") / "schema.json").read_text(encoding="utf-8")
    _write(_target(args), text, "the schema of rule files")
    return 0


def _target(args: argparse.Namespace) -> Path | None:
    """The file that ``-o`` names, which may be written."""
    target = None if args.out is None else Path(args.out)
    if target is not None and target.exists() and not args.force:
        raise ConfigError(f"{target} exists; use --force to overwrite it")
    return target


def _write(target: Path | None, text: str, what: str) -> None:
    if target is None:
        print(text, end="")
    else:
        target.write_text(text, encoding="utf-8")
        print(f"{target}: {what}")


def _check(args: argparse.Namespace) -> int:
    from hybrid.placement.rules import load_rules

    if args.file == "auto":
        raise ConfigError("check: auto is what is done without rules; name a rule file")
    rule_set = load_rules(args.file)
    print(f"{rule_set.source}: {_count(len(rule_set.rules), 'rule')}, well-formed")
    if args.model is None:
        return 0
    return _check_model(args, rule_set)


def _check_model(args: argparse.Namespace, rule_set: RuleSet) -> int:
    from hybrid.config import model_path
    from hybrid.gguf import GGUFFile
    from hybrid.placement.memory import read_model
    from hybrid.placement.planner import check

    with GGUFFile.open(model_path(args.model), header_only=True) as file:
        model = read_model(file)
        machine = machine_of(args).with_rules(rule_set.budgets)
        selection, found = check(rule_set, file, model, machine)
        for problem in found:
            print(problem, file=sys.stderr)
        if found:
            raise PlacementError(f"{rule_set.source}: {_count(len(found), 'problem')} with {file.path.name}")
        loaded = [tensor for tensor in model.tensors if tensor.share]
        open_ = sum(t.name not in selection.claims or t.name in selection.open_experts for t in loaded)
        left = f", auto places the other {open_}" if open_ else ""
        print(
            f"{file.path.name}: rules place {len(loaded) - open_} of {_count(len(loaded), 'tensor')}{left}; "
            f"`hybrid plan --rules {args.file}` shows where, and whether it fits"
        )
    return 0


def _init(args: argparse.Namespace) -> int:
    from hybrid.config import model_path
    from hybrid.gguf import GGUFFile
    from hybrid.placement.memory import RunSize
    from hybrid.placement.planner import Planner
    from hybrid.placement.rules.writing import rule_file
    from hybrid.placement.settings import context_of

    target = _target(args)
    with GGUFFile.open(model_path(args.file), header_only=True) as file:
        planner = Planner(file, "auto", machine_of(args))
        context = context_of(args.ctx_size, None, planner.model.dims.context_length or 0)
        found = planner.plan(RunSize(context) if context else RunSize())
        text = rule_file(planner.model, found, file.path.name, file.architecture)
    number = _count(text.count("- select:"), "rule")
    _write(target, text, f"{number}; change it and run with --rules {target}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
