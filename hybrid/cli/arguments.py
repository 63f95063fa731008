"""Command-line flags: each one has its environment variable, its parser and its help in `hybrid.env`."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from hybrid import env
from hybrid.cli.progress import byte_progress
from hybrid.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hybrid.gguf import GGUFFile
    from hybrid.llm import LLM
    from hybrid.placement.machine import Machine
    from hybrid.placement.rules import Rules
    from hybrid.sampling_params import SamplingParams


class _Unset(NamedTuple):
    """Default of a flag until the command line is parsed; then its variable or ``fallback`` replaces it."""

    variable: str
    fallback: Any
    entry: env.EnvVar


class Extend(argparse.Action):
    """Collects the values of a flag that is given several times; a value may itself be several."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        found = getattr(namespace, self.dest)
        new = values if isinstance(values, tuple | list) else [values]
        setattr(namespace, self.dest, [*(found if isinstance(found, list) else ()), *new])


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and " -" not in message:
            message += "; a text of several words needs quotes"
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def flag(
    parser: argparse._ActionsContainer,
    *names: str,
    default: Any = None,
    help: str | None = None,
    choices: Sequence[str] | None = None,
    scope: str = "",
    **kwargs: Any,
) -> None:
    """Add an option whose last long name ``--some-flag`` is described by ``HYBRID_SOME_FLAG``, or with a
    ``scope`` by ``HYBRID_SCOPE_SOME_FLAG``, where it means another thing than in other commands.

    Variables parsed by `env.boolean` become switches. ``help`` replaces the table's text; ``choices`` are
    those of the values that this command takes.
    """
    long_names = [name for name in names if name.startswith("--")]
    words = [*filter(None, [scope]), *long_names[-1][2:].split("-")]
    variable = "_".join(["HYBRID", *words]).upper()
    entry = env.VARIABLES[variable]
    text = (help or entry.purpose).replace("%", "%%")
    if choices is not None:
        text += f": {_listed(choices)}"
        entry = dataclasses.replace(entry, parse=env.one_of(*choices), accepts=_listed(choices))
    if default is not None and default is not False:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    if entry.parse is env.boolean:
        kwargs.setdefault("action", "store_true")
        default = bool(default)
    else:
        kwargs.setdefault("type", _argument_type(entry))
        kwargs.setdefault("metavar", long_names[-1][2:].rpartition("-")[2].upper())
    parser.add_argument(
        *names,
        dest=long_names[-1][2:].replace("-", "_"),
        default=_Unset(variable, default, entry),
        help=f"{text} [{variable}]",
        **kwargs,
    )


def _listed(choices: Sequence[str]) -> str:
    return " or ".join((", ".join(choices[:-1]), choices[-1]) if len(choices) > 1 else choices)


def _argument_type(entry: env.EnvVar) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return entry.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {entry.accepts}, found {text!r}") from None

    return parse


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Give every flag that was not given the value of its variable, or its default.

    Raises:
        ConfigError: a variable that is needed does not parse.
    """
    for name, value in vars(args).items():
        if isinstance(value, _Unset):
            found = env.get(value.variable, value.entry)
            setattr(args, name, value.fallback if found is None else found)
    return args


def add_general(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    group = parser.add_argument_group("general")
    flag(group, "--log-level", default="warning")
    flag(group, "--debug")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``-m``: the demo model unless something else is asked for."""
    flag(parser, "-m", "--model", default="demo")


def add_runtime(parser: argparse.ArgumentParser, context: str | None = None) -> None:
    """Flags that `open_model` reads, besides ``-m``. ``context`` is the help of ``-c`` where it differs."""
    group = parser.add_argument_group("machine")
    flag(group, "-c", "--ctx-size", help=context)
    flag(group, "-ctk", "--cache-type-k", "--kv-format")
    flag(group, "-t", "--threads")
    flag(group, "--isa")
    add_rules(group)
    flag(group, "--numa", default="auto")
    flag(group, "--packed-cache")
    flag(group, "--no-cuda-graph")
    flag(group, "--trace", metavar="FILE")
    flag(group, "--ram")
    flag(group, "--vram", action=Extend)
    flag(group, "--fit")
    add_experts(group)


def add_rules(group: argparse._ActionsContainer) -> None:
    """Flags that `rules_of` reads: rules, and what llama.cpp calls by short names."""
    flag(group, "--rules", default="auto")
    flag(group, "-ot", "--override-tensor", action=Extend, metavar="REGEX=DEVICE")
    flag(group, "-cmoe", "--cpu-moe")
    flag(group, "-ncmoe", "--n-cpu-moe", metavar="N")
    flag(group, "-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N")


def rules_of(args: argparse.Namespace, file: GGUFFile, machine: Machine | None = None) -> Rules:
    """The rules that the flags of `add_rules` mean for a model and a machine, this one if none is given.

    Raises:
        PlacementError: a flag is malformed, or contradicts the rules or the machine.
    """
    from hybrid.placement.rules.flags import PlacementFlags, with_flags

    overrides = args.override_tensor
    flags = PlacementFlags(
        (overrides,) if isinstance(overrides, str) else tuple(overrides or ()),
        args.cpu_moe,
        args.n_cpu_moe,
        args.n_gpu_layers,
    )
    if flags.given and machine is None:
        from hybrid.calibration import this_machine

        machine = this_machine()
    num_layers = file.get(f"{file.architecture}.block_count", int, default=0)
    gpus = () if machine is None else tuple(gpu.name for gpu in machine.gpus)
    return with_flags(args.rules, flags, num_layers, gpus)


def rules_for(args: argparse.Namespace, model: str | Path | None) -> Rules:
    """`rules_of` for a model's file on this machine."""
    from hybrid.config import model_path
    from hybrid.gguf import GGUFFile

    with GGUFFile.open(model_path(model)) as file:
        return rules_of(args, file)


def add_experts(group: argparse._ActionsContainer) -> None:
    """Flags that run fewer experts."""
    flag(group, "--experts-per-token", metavar="N")
    flag(group, "--expert-threshold", metavar="SHARE")


def add_sampling(parser: argparse.ArgumentParser, *, n_predict: int) -> None:
    """Flags that `sampling_params` reads."""
    group = parser.add_argument_group("sampling")
    flag(group, "-n", "--predict", "--n-predict", default=n_predict, metavar="N")
    flag(group, "--temp", default=0.8)
    flag(group, "--top-k", default=40)
    flag(group, "--top-p", default=0.95)
    flag(group, "--min-p", default=0.05)
    flag(group, "--repeat-penalty", default=1.0)
    flag(group, "--presence-penalty", default=0.0)
    flag(group, "--frequency-penalty", default=0.0)
    flag(group, "-s", "--seed")
    flag(group, "--stop", action=Extend)
    flag(group, "--ignore-eos")


def open_model(args: argparse.Namespace, **options: Any) -> LLM:
    """The model that the flags of `add_model` and `add_runtime` describe; ``options`` go to `LLM` too.

    Shows a progress bar while it loads if stderr is a terminal.
    """
    rules = rules_for(args, args.model)  # a bad file is told before torch is loaded
    end_on_bus_error(args)
    with byte_progress("loading") as show:
        from hybrid.llm import LLM

        return LLM(args.model, rules, args.ctx_size, progress=show, **runtime_options(args), **options)


def end_on_bus_error(args: argparse.Namespace) -> None:
    """With a packed cache, end with a line where the system cannot read a page of it."""
    if args.packed_cache is not None:
        from hybrid.kernels import cpu

        cpu.end_on_bus_error(
            f"hybrid: a file in {args.packed_cache} was changed or cut short while it was in use, or its "
            "disk failed (SIGBUS); start again, which checks it and makes it anew where need be"
        )


def by_device(given: list[tuple[str | None, float]] | None, flag: str, default: str) -> dict[str, float]:
    """Values of a flag that names devices; ``default`` is the device where it names none."""
    found: dict[str, float] = {}
    for name, value in given or ():
        device = name or default
        if device in found:
            raise ConfigError(f"{flag}: {device} is given twice")
        found[device] = value
    return found


def vram_of(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of each GPU that ``--vram`` names.

    Raises:
        ConfigError: another device is named, or one twice.
    """
    found = by_device(args.vram, "--vram", "cuda:0")
    for device in found:
        if not device.startswith("cuda:"):
            raise ConfigError(f"--vram: expected cuda:N, found {device!r}; RAM is given by --ram")
    return {device: round(n_bytes) for device, n_bytes in found.items()}


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `LLM` and `AsyncLLM` that the flags of `add_runtime` give."""
    return {
        "num_threads": args.threads,
        "isa": args.isa,
        "kv_format": args.kv_format,
        "ram_bytes": args.ram,
        "vram_bytes": vram_of(args),
        "fit": args.fit,
        "experts_per_token": args.experts_per_token,
        "expert_threshold": args.expert_threshold,
        "numa": args.numa,
        "packed_cache": args.packed_cache,
        "cuda_graph": not args.no_cuda_graph,
        "trace": args.trace,
    }


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the flags of `add_sampling` say; a seed is drawn if none is given, and put into ``args``.

    Raises:
        RequestError: a value is out of range.
    """
    if args.n_predict == 0:
        raise ConfigError("-n: expected an integer >= 1, or -1, found 0")
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    stop = [args.stop] if isinstance(args.stop, str) else args.stop
    try:
        return _sampling_params(args, stop)
    except RequestError as error:
        option = _OPTIONS.get(error.field or "")
        if option is None:
            raise
        raise RequestError(error.problem, field=option, expected=error.expected, found=error.found) from None


# Parameters whose options have other names.
_OPTIONS = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "max_tokens": "-n",
    "seed": "--seed",
    "stop": "--stop",
}


def _sampling_params(args: argparse.Namespace, stop: list[str] | None) -> SamplingParams:
    from hybrid.sampling_params import SamplingParams

    return SamplingParams(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repeat_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        stop=stop,
        ignore_eos=args.ignore_eos,
        max_tokens=None if args.n_predict == -1 else args.n_predict,
    )
