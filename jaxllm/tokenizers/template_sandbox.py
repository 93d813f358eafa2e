"""Jinja for templates that somebody else made: they see their variables and nothing of Python.

A rendering takes a limited number of steps (`template_costs.py`), so that it ends in reasonable
time and memory.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxllm.tokenizers.template_costs import (
    CHARGED_FILTERS,
    filter_steps,
    method_steps,
    operator_steps,
)

_STEPS = 200_000  # of a rendering; conversations take some for each message
# Filters and variables that no template can name.
_STEP, _WORK = "a step", "the steps left"
_EDGE, _EDGES = "an edge", "the edges"


def render(source: str, variables: Mapping[str, Any], edges: tuple[str, str] = ("", "")) -> str:
    """The text that a template writes.

    Args:
        source: Jinja source.
        variables: what it may read, by name.
        edges: what to write where a `{% generation %}` block begins and ends.

    Raises:
        jinja2.TemplateError: it is no Jinja, calls `raise_exception`, reaches for what it may not,
            or takes too many steps.
        Exception: of whatever else it does, as a division by zero.
    """
    work = _Work(_STEPS)
    hidden = {_WORK: work, _EDGES: edges}
    return compiled(source).render({**variables, "range": work.range, **hidden})


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The program of a template, for `render`.

    Raises:
        jinja2.TemplateSyntaxError: the source is no Jinja.
        RecursionError: it nests too deeply.
    """
    return _environment().from_string(_counted(parse(source)))


def parse(source: str) -> nodes.Template:
    """The syntax tree of a template.

    Raises:
        jinja2.TemplateSyntaxError: the source is no Jinja.
        RecursionError: it nests too deeply.
    """
    return _environment().parse(source)


def tells_generation(source: str) -> bool:
    """Whether a template says, by `{% generation %}`, what the assistant writes.

    Raises:
        As `parse`.
    """
    return any(node.name == _EDGE for node in parse(source).find_all(nodes.Filter))


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` around what the assistant writes: its content, between
    the edges of the rendering."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.Filter(nodes.Const(side), _EDGE, [], [], None, None)])
            for side in range(2)
        )
        return nodes.Scope([begin, *body, end]).set_lineno(line)


@dataclasses.dataclass
class _Work:
    """The steps that a rendering may still take: it is to end in reasonable time."""

    left: int

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise jinja2.TemplateError(
                f"takes more than {_STEPS:,} steps; its loops, macros or products are too large"
            )

    def range(self, *arguments: int) -> range:
        numbers = range(*arguments)
        self.spend(len(numbers))
        return numbers


def _counted(tree: nodes.Template) -> nodes.Template:
    """`tree`, in which each run of what can run more than once takes a step."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
        step = nodes.Filter(nodes.Const(True), _STEP, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test:  # `for x in y if test`
            node.test = nodes.And(step, node.test, lineno=node.lineno)
    tree = _Sums().visit(tree)
    tree.set_environment(_environment())
    return tree


class _Sums(NodeTransformer):
    """Makes of `a ~ b` the sum of two texts, since sums take steps."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        texts: list[nodes.Expr] = [
            nodes.Filter(each, "string", [], [], None, None, lineno=node.lineno)
            for each in node.nodes
        ]
        return functools.reduce(lambda a, b: nodes.Add(a, b, lineno=node.lineno), texts)


@jinja2.pass_context
def _step(context: Context, value: bool) -> bool:
    context[_WORK].spend(1)
    return value


@jinja2.pass_context
def _edge(context: Context, side: int) -> str:
    return context[_EDGES][side]


class _Sandbox(ImmutableSandboxedEnvironment):
    """One in which what can make much of little takes steps for it, before it makes it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context[_WORK].spend(operator_steps(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *arguments: Any, **named: Any) -> Any:
        context[_WORK].spend(method_steps(function, arguments, named))
        return super().call(context, function, *arguments, **named)


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes steps for what it makes; `function` has the value and its arguments."""

    @jinja2.pass_context
    def charged(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        context[_WORK].spend(filter_steps(name, value, (*arguments, *named.values())))
        return function(value, *arguments, **named)

    return charged


def _replaced(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    return str(value).replace(str(old), str(new), -1 if count is None else count)


@jinja2.pass_context
def _joined(
    context: Context, value: Iterable[Any], d: Any = "", attribute: str | int | None = None
) -> str:
    """Jinja's `join`, taking steps: its arguments stand the other way round than the method's."""
    if attribute is not None:
        value = map(filters.make_attrgetter(context.environment, attribute), value)
    parts = [str(part) for part in value]
    context[_WORK].spend(filter_steps("join", str(d), (parts,)))
    return str(d).join(parts)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as templates in tokenizer files are written for."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    del environment.globals["lipsum"]  # filler text of any length
    environment.filters["tojson"] = _to_json
    environment.filters["replace"] = _replaced
    environment.filters["wordwrap"] = functools.partial(filters.do_wordwrap, environment)
    for name in CHARGED_FILTERS:
        environment.filters[name] = _charged(name, environment.filters[name])
    environment.filters["join"] = _joined
    environment.filters[_STEP] = _step
    environment.filters[_EDGE] = _edge
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
