"""`hybrid plan MODEL`: where everything goes and how fast it should be, from the header alone."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.machine import add_machine, machine_of
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.placement.plan import Plan
    from hybrid.placement.planner import Planner

HELP = "show where a model's tensors go, what that takes and how fast it should be"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="MODEL", help="a GGUF file; a header alone will do (default: -m)"
    )
    arguments.add_model(parser)
    arguments.flag(parser, "-c", "--ctx-size")
    arguments.flag(parser, "-ub", "--ubatch-size", default=512)
    arguments.flag(parser, "-np", "--parallel", default=1)
    arguments.flag(parser, "-ctk", "--cache-type-k", "--kv-format")
    arguments.add_rules(parser)
    arguments.flag(parser, "--numa", default="auto")
    arguments.flag(parser, "--fit")
    arguments.add_experts(parser)
    add_machine(parser)
    output = parser.add_argument_group("output")
    arguments.flag(output, "-o", "--output", default="md", choices=("md", "json", "yaml", "html"))
    arguments.flag(output, "--explain")
    arguments.flag(output, "--emit")


_THRESHOLD = "speed is predicted as if the threshold dropped no experts; how many it does shows when running"


def run(args: argparse.Namespace) -> int:
    from hybrid.config import DEFAULT_MAX_MODEL_LEN, ExpertUse, model_path
    from hybrid.gguf import GGUFFile
    from hybrid.placement.memory import RunSize
    from hybrid.placement.planner import Planner
    from hybrid.placement.settings import context_of, kv_format_of

    path = model_path(args.model if args.file is None else args.file)
    with GGUFFile.open(path, header_only=True) as file:
        experts = ExpertUse(args.experts_per_token, args.expert_threshold)
        machine = machine_of(args)
        rules = arguments.rules_of(args, file, machine)
        planner = Planner(file, rules, machine, experts, args.numa)
        longest = planner.model.dims.context_length or DEFAULT_MAX_MODEL_LEN
        context = context_of(args.ctx_size, planner.rule_set, longest)
        if context > longest:
            raise ConfigError(
                f"-c: expected at most the {longest} tokens the model was made for, found {context}"
            )
        kv_format = kv_format_of(args.kv_format, planner.rule_set)
        size = RunSize(context, args.parallel, args.ubatch_size, kv_format)
        if args.explain is not None:
            print("\n".join(planner.explain(args.explain, size)))
            return 0
        found = planner.plan(size, fit=args.fit)
        if planner.experts.threshold:
            found = replace(found, warnings=(*found.warnings, _THRESHOLD))
    _print(args, planner, found, path)
    return 0


def _print(args: argparse.Namespace, planner: Planner, found: Plan, path: Path) -> None:
    if args.emit is not None:
        from hybrid.placement.llamacpp import flags

        print(shlex.join(flags(planner.model, found)))
    elif args.output == "md":
        from hybrid.cli.plan_text import sections

        for part in sections(planner.model, found, path.name):
            print(part)
    elif args.output == "html":
        from hybrid.cli.plan_page import page

        print(page(planner.model, found, path.name))
    else:
        from hybrid.placement.report import as_json

        content = {"file": str(path), **as_json(planner.model, found)}
        if args.output == "json":
            print(json.dumps(content, indent=2, ensure_ascii=False))
        else:
            import yaml

            print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=200), end="")
