"""Chat templates: whole ones, ones that a mutation makes of them, and ones that want more than there is."""

from __future__ import annotations

import random

WHOLE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content | trim }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{{ ns.n }}{{ m | tojson }}{%- endfor -%}",
    "{% macro turn(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ strftime_now('%Y') }}",
)  # fmt: skip
HOSTILE = (
    "{% for i in range(1000000000) %}x{% endfor %}", "{% for i in range(10) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}", "{{ 10 ** 10 ** 8 }}", "{{ [0] * 10 ** 10 }}", "{{ 'a' | center(10 ** 10) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__ }}", "{{ 1 / 0 }}", "{{ [][5] }}", "{{ undefined.x.y }}",
    "{{ messages[0]['nothing']['more'] }}", "{% include 'x' %}", "{% extends 'x' %}", "{% import 'os' as os %}{{ os }}",
    "{{ raise_exception(5) }}", "{{ raise_exception() }}", "{{ strftime_now(5) }}", "{{ strftime_now('%' * 9999) }}", "{{ '%d' % 'x' }}",
    "{{ '{:>{w}}'.format('x', w=10**9) }}", "{{ 'x'.format(**messages[0]) }}", "{% set x = 'ab' %}{% for i in range(40) %}{% set x = x + x %}{% endfor %}{{ x }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{{ (messages * 100000000) | length }}", "{{ range(10 ** 9) | list | length }}", "{{ '\\ud800' }}", "{{ messages | map('nothing') | list }}",
    "{{ lipsum(n=1000000) }}", "{{ dict(a=1).update }}", "{{ messages.append(1) }}", "{{ 'x' | nothing }}", "{% break %}", "{{ loop.index }}",
    "{% generation %}x{% endgeneration %}", "{% generation %}x", "{{ messages | tojson(indent=10**9) }}", "{{ messages | tojson('x', 'y', 'z', 1, 2, 3) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ joiner().__call__.__func__ }}", "{{ ('x' * 1000000) | wordwrap(1) | length }}",
    "{{ (9 | string * 5000) | int }}", "{{ (2 ** 100000) | string | length }}", "{{ 'x' | indent(10 ** 10) }}", "{{ '%1000000000d' % 1 }}",
    "{% filter upper %}{% for i in range(99999999) %}{% endfor %}{% endfilter %}", "{{ messages | groupby('role') | map(attribute='x') | sum }}",
    "{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!' | replace('a', 'aa' * 1000000) | length }}", "{% set _ = messages.pop() %}", "{{ self }}", "{{ bos_token * 10 ** 9 }}",
)  # fmt: skip
_PIECES = ("{{", "}}", "{%", "%}", "{#", "#}", "'", '"', "|", "for", "in", "endfor", "if", "endif", "messages", "[", "]", "0", ".", "-", "\x00", "é", "~", "**", "range(", ")")  # fmt: skip


def damaged_template(rng: random.Random) -> str:
    """A template by one of the three ways."""
    what = rng.random()
    if what < 0.35:
        return rng.choice(HOSTILE)
    text = rng.choice(WHOLE)
    if what < 0.45:
        return text + rng.choice(HOSTILE)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        kind = rng.random()
        if kind < 0.4:
            text = text[:at] + rng.choice(_PIECES) + text[at:]
        elif kind < 0.8:
            text = text[:at] + text[at + rng.randint(1, 12) :]
        else:
            other = rng.choice(WHOLE)
            text = text[:at] + other[rng.randrange(len(other)) :]
    return text
