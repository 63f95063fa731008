"""A Jinja environment for templates that come with a model: they are untrusted programs.

Jinja's immutable sandbox keeps them from Python's internals; this adds bounds. Every operation that can
turn small input into much data or time inside one C call is either stated to the meter first or not
offered. Settings and extras (``raise_exception``, ``strftime_now``, ``tojson``, loop controls, the
``generation`` tag) are those that chat templates are written for, as in Hugging Face's
``apply_chat_template``.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hybrid.chat import costs
from hybrid.chat.meter import LimitExceeded, meter

MAX_SOURCE_CHARS = 1 << 18
_SMALL_LITERAL = 16


class TemplateRefusal(jinja2.TemplateError):
    """The template called ``raise_exception``: it does not accept these messages."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment. Render only inside `hybrid.chat.meter.metered`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, tojson: Callable[..., str]) -> None:
        # `finalize` that wants the context also keeps constant expressions from running while compiling.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            finalize=_finalize,
            extensions=[LoopControls, _GenerationTag],
        )
        self.filters = {
            name: _stated(name, function)
            for name, function in {**self.filters, "tojson": tojson}.items()
            if name not in costs.REFUSED_FILTERS
        } | {"_sliced": _sliced, "_looked": _looked, "_joined": _finalize}
        self.tests = {name: _looking(cast("Callable[..., Any]", test)) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def load(self, source: str) -> tuple[jinja2.Template, frozenset[str]]:
        """Compile ``source``; also returns the strings it computes with: constants, attribute names."""
        if len(source) > MAX_SOURCE_CHARS:
            raise jinja2.TemplateError(f"it is longer than {MAX_SOURCE_CHARS} characters")
        tree = self.parse(source)
        constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        code = self.compile(_StateCosts().visit(tree).set_environment(self))
        return self.template_class.from_code(self, code, self.make_globals(None)), frozenset(
            constants | names
        )

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a template, macro or block (replaces the environment's ``"".join``)."""
        parts = list(parts)
        meter().make(sum(map(len, parts)))
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter().make(costs.of_operator(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            meter().look(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType) or isinstance(owner, str):
            args = costs.drained(args)
            meter().make(costs.of_method(owner, __obj.__name__, args, kwargs))
        else:
            meter().look([*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        meter().make(costs.of_result(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            meter().make(costs.of_format(text, (args, kwargs)))
            if "{" in re.sub(r"\{[^{}]*\}|\{\{", "", text):
                raise SecurityError("nested fields of str.format are not offered")
            return wrapped(*args, **kwargs)

        return checked


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks training targets; its body renders as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


class _StateCosts(NodeTransformer):
    """Puts a filter that states its operand's cost where Jinja compiles to a bare Python operator."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_looked")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_looked")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(item, "_joined") for item in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, "_sliced")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_sliced") if len(node.items) > _SMALL_LITERAL else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        is_value = node.ctx == "load" and len(node.items) > _SMALL_LITERAL
        return _filtered(node, "_sliced") if is_value else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_sliced") if len(node.items) > _SMALL_LITERAL else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _filtered(node.key, "_looked")
        return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)  # type: ignore[return-value]


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    meter().make(meter().look(value))
    return value


@jinja2.pass_context
def _looked(context: Context, value: Any) -> Any:
    meter().look(value)
    return value


@jinja2.pass_context
def _sliced(context: Context, value: Any) -> Any:
    meter().make(costs.of_result(value))
    return value


def _stated(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a filter that states its cost; it wants the context, so it never runs early."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @jinja2.pass_context
    @functools.wraps(function)
    def filter_(context: Context, *args: Any, **kwargs: Any) -> Any:
        if name in costs.EXPANDING_FILTERS:
            args = costs.drained(args)
        if name not in costs.SHALLOW_FILTERS:
            meter().look([*args, *kwargs.values()])
        meter().make(costs.of_filter(name, args, kwargs))
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(first[wants], *args, **kwargs) if wants else function(*args, **kwargs)
        meter().make(costs.of_result(result))
        return result

    return filter_


def _looking(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def test(*args: Any) -> Any:
        meter().look([arg for arg in args if not isinstance(arg, jinja2.Environment)])
        return function(*args)

    return test


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _strftime_now(template: str) -> str:
    if len(template) > 200 or re.search(r"\d{2}", template):
        raise LimitExceeded("it asks for a date in an unusual form")
    return datetime.now().astimezone().strftime(template)
