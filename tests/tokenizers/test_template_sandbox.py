"""What a template may do, and how much of it; seen as a chat template that does it."""

import itertools

import pytest

from jaxllm.errors import UserError
from jaxllm.tokenizers import template_sandbox
from jaxllm.tokenizers.byte_tokenizer import ByteTokenizer
from jaxllm.tokenizers.chat_template import ChatTemplate


def written(source, *contents):
    """The text of a conversation of these contents, beginning with the user's."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": next(roles), "content": content} for content in contents]
    return ChatTemplate(source, ByteTokenizer()).render(messages)


DOUBLING_MACRO = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
)
DOUBLING_CALL = (
    "{% macro f(n) %}{% set up = caller %}{% if n %}{% call f(n - 1) %}{{ up() }}{{ up() }}"
    "{% endcall %}{% else %}{{ up() }}{% endif %}{% endmacro %}{% call f(40) %}x{% endcall %}"
)
DOUBLING_BLOCKS = "".join(
    f"{{% block b{n} %}}{{{{ self.b{n + 1}() }}}}{{{{ self.b{n + 1}() }}}}{{% endblock %}}"
    for n in range(30)
)
GROWING = (
    "{% set s = namespace(x='xxxx') %}{% for i in range(40) %}{% set s.x = GROWN %}{% endfor %}"
)
DOUBLING_BLOCKS += "{% block b30 %}x{% endblock %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only questions') }}", "only questions"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{% for i in range(10**9) %}{% endfor %}", "steps"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in 'x' * 9999 %}{% for j in 'x' * 9999 %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% for i in 'x' * 999 %}{% for j in 'x' * 9999 if not j %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (
            "{% for i in 'xx' recursive %}{{ loop('xx') if loop.depth < 40 }}{% endfor %}",
            "steps",
        ),
        (DOUBLING_MACRO, "steps"),
        (DOUBLING_CALL, "steps"),
        (DOUBLING_BLOCKS, "steps"),
        ("{{ 'x' * 10**9 }}", "steps"),
        ("{{ 10**9 * [0] }}", "steps"),
        ("{{ 9 ** (9 ** 9) }}", "steps"),
        (
            "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
            "{% endfor %}",
            "steps",
        ),
        ("{{ '%1000000000d' % 1 }}", "steps"),
        ("{{ '%.1000000000f' % 1 }}", "steps"),
        ("{{ '%*d' % (10**9, 1) }}", "steps"),
        ("{{ 'x'.center(10**9) }}", "steps"),
        ("{{ messages[0].content.ljust(width=10**9) }}", "steps"),
        ("{{ '\t'.expandtabs(10**9) }}", "steps"),
        ("{{ '1'.zfill(10**9) }}", "steps"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "steps"),
        ("{{ '{:>1000000000}'.format(1) }}", "steps"),
        ("{{ '{:>{}}'.format(1, 10**9) }}", "steps"),
        ("{{ 'a\nb' | indent(10**9) }}", "steps"),
        ("{{ 'a' | center(10**9) }}", "steps"),
        ("{{ '%*d' | format(10**9, 1) }}", "steps"),
        ("{{ 1.5 | round(10**9, 'ceil') }}", "steps"),
        ("{{ messages | tojson(indent=10**9) }}", "steps"),
        ("{{ messages | batch(10**9, 'x') | list }}", "steps"),
        ("{{ messages | slice(10**9) | list }}", "steps"),
        ("{{ ['a'] | map('center', 10**9) | list }}", "steps"),
        (GROWING.replace("GROWN", "s.x + s.x"), "steps"),
        (GROWING.replace("GROWN", "s.x ~ s.x"), "steps"),
        (GROWING.replace("GROWN", "s.x.replace('x', 'xx')"), "steps"),
        (GROWING.replace("GROWN", "s.x | replace('x', 'xx')"), "steps"),
        (GROWING.replace("GROWN", "s.x.translate({120: 'xx'})"), "steps"),
        (GROWING.replace("GROWN", "s.x.join([s.x, s.x])"), "steps"),
        (GROWING.replace("GROWN", "[s.x, s.x] | join(s.x)"), "steps"),
        (GROWING.replace("GROWN", "s.x | wordwrap(1, True, s.x)"), "steps"),
        ("{{ lipsum(10**9) }}", "undefined"),
        ("{{ '\\ud800' }}", "not Unicode text"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_what_a_template_may_not_do_is_told(source, message, monkeypatch):
    monkeypatch.setattr(template_sandbox, "_STEPS", 20_000)
    with pytest.raises(UserError, match=message):
        written(source, "a")


def test_steps_change_nothing_of_what_a_template_writes():
    source = (
        "{% for m in messages if m.content != 'b' %}{{ loop.index }}/{{ loop.length }}"
        "{{ m.content * 2 }}{{ '%5.1f|%s' % (2 ** loop.index, m.role) }}{{ loop.revindex0 % 2 }};"
        "{% else %}none{% endfor %}{% for x in [[1, [2]], 3] recursive %}"
        "{{ x if x is number else loop(x) }}{% endfor %}{% macro f(x) %}<{{ x }}{{ caller() }}>"
        "{% endmacro %}{% call f(7 * 6) %}{% block b %}!{% endblock %}{% endcall %}"
    )
    expected = "1/2aa  2.0|user1;2/2cc  4.0|user0;123<42!>"
    assert written(source, "a", "b", "c") == expected


def test_what_takes_steps_makes_what_it_did():
    source = (
        "{{ 'a' ~ messages[0].content ~ 1 ~ nothing }}|{{ [1, 2] + [3] }}|"
        "{{ 'a-b'.replace('-', '+') }}|{{ messages | join(',', attribute='content') }}|"
        "{{ [1, 'x'] | join }}|{{ '-'.join(['a', 'b']) }}|"
        "{{ 'aXbX' | replace('X', 'y', 1) }}|{{ 'a' | center(3) }}|{{ 'a\nb' | indent(2) }}|"
        "{{ '%s:%d' | format('n', 3) }}|{{ '{}={:>3}'.format('k', 7) }}|{{ 2.345 | round(1) }}|"
        "{{ {'a': 1} | tojson }}|{{ 'ab cd' | wordwrap(2) }}|{{ [1, 2, 3] | batch(2) | list }}"
    )
    expected = (
        'ab1|[1, 2, 3]|a+b|b,c|1x|a-b|aybX| a |a\n  b|n:3|k=  7|2.3|{"a": 1}|ab\ncd|[[1, 2], [3]]'
    )
    assert written(source, "b", "c") == expected


def test_each_rendering_may_take_as_many_steps():
    source = "{% for i in range(60000) %}{% endfor %}x"
    assert [written(source, "a") for _ in range(3)] == ["x"] * 3
