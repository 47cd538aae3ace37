"""Chat templates of strangers: those of real models as transformers renders them, all others end soon and in a sentence."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from template_mutants import mutants

from lowbit.calibration.selftext import render_chat
from lowbit.engine.chat_template import ChatTemplate
from lowbit.engine.tokenizer import AnyTokenizer, FolderTokenizer
from lowbit.errors import SourceError, TextError
from tiny import tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "description": "a <sum>", "parameters": {"type": "object", "properties": {"a": {"type": "number", "description": "é"}}}}}]  # fmt: skip
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " hello there \n"}],
    [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "é\n\nand?"}],
    [{"role": "user", "content": "add"}, {"role": "assistant", "content": None, "reasoning": "I add them", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1.5, "b": [True, None, "x"]}}}]}, {"role": "tool", "content": "3"}, {"role": "user", "content": "thanks"}],
]  # fmt: skip
REAL = {
    "headers": """{{- bos_token }}{%- if tools is not none %}{%- set date = "26 Jul" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|h|>system<|/h|>\n\n" }}{%- if tools %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}{%- endif %}
{{- system }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|/h|>\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\n\n' }}{%- endif %}
""",
    "thinking": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.last or (not loop.last and reasoning) %}{{- '<|s|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- '<|s|>' + message.role + '\n' + content }}{%- endif %}
        {% generation %}{%- for call in message.tool_calls or [] %}{{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
        {%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}{%- endfor %}{% endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|s|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
    {%- else %}{{- '<|s|>' + message.role + '\n' + content + '<|e|>' + '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|s|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}""",
    "turns": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages if message.role != 'tool' %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start>' + role + '\n' + (message['content'] or '') | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start>model\n'}}{% endif %}""",
    "inst": """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{%- set others = messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | unique | sort | join(', ') %}
{{- users[-1].content }}|{{ others }}|{{ '%s of %05.2f' % (users|length, 3.14159) }}|{{ '{:>8}{!r}'.format('a', 'b') }}|{% for k, v in messages[0].items() %}{{ k }}={{ v|upper|replace('H', 'J') }};{% endfor %}
{%- macro show(value, depth=0) %}{% if value is mapping %}{% for key in value|sort %}{{ '  ' * depth }}{{ key }}:
{{ show(value[key], depth + 1) }}{% endfor %}{% elif value is sequence and value is not string %}[{% for v in value %}{{ show(v, depth) }}{{ ', ' if not loop.last }}{% endfor %}]{% else %}{{ value|string|indent(2, true) }}{% endif %}{% endmacro %}
{{ show(messages) }}{% set text %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.cycle('a', 'b') }}{{ m.content[:5] }}{% endfor %}{% endset %}{{ text|length }}{{ text }}{{ messages|batch(2)|list|length }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 8 }} {{ [1, 2] + [3] }} {{ 'ab' * 3 }} {{ dict(a=1, b='c')|tojson }} {{ (1, 2)|first }} {% if messages|map('upper') %}lazy{% endif %} {{ messages|map(attribute='role')|list }} {{ tools is defined }} {{ 'x' in 'axb' }} {{ {'a': 1}.get('b', 'none') }} {{ 'A-B'.lower().split('-')|join('+') }} {{ loop is defined }} {{ 3.7|round|int }} {{ '5'|int + 1 }}""",
}  # fmt: skip

ENDLESS = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "text twice as long": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "lists of lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns }}",
    "hashes": "{% set ns = namespace(s=(1,)) %}{% for i in range(60) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ {}.get(ns.s) }}",
    "comparing": "{% set a = 'x' * 1000000 %}{% set b = 'x' * 1000000 %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "depth": "{% set ns = namespace(s=(1,)) %}{% for i in range(99999) %}{% set ns.s = (ns.s,) %}{% endfor %}{{ {ns.s: 1} }}",
    "iterators": "{% set ns = namespace(s=(1,)) %}{% for i in range(99999) %}{% set ns.s = ns.s|map('list') %}{% endfor %}{{ ns.s|list }}",
    "literal text": "{% set a %}{% for i in range(99999) %}" + "y" * 200000 + "{% endfor %}{% endset %}",
    "text in a macro": "{% macro f() %}" + "y" * 200000 + "{% endmacro %}{% set a %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endset %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sums": "{{ " + "1+" * 5000 + "1 }}",
    "branches": "{% if 0 %}" + "{% elif 0 %}" * 8000 + "{% endif %}",
    "parts": "{{x}}" * 50000,
    "size": "x" * 10**7,
    **{text: "{{ " + text + " }}" for text in (
        "1/0", "messages[99].content", "range(10**9)|list", "'x' * 10**10", "[1] * 10**9", "10**(10**8)", "10**10**8**8**8",
        "'x'|center(10**10)", "'x'.ljust(10**9)", "'x'.zfill(10**10)", "'%1000000000d' % 1", "'%*d' % (10**9, 1)", "'%(a(b))1000000000d' % {'a(b)': 1}",
        "'{:1000000000}'.format(1)", "'{:{}}'.format(1, 10**9)", "'{a:1000000000}'.format_map({'a': 1})", "'%.999999999f'|format(1)",
        "('x\n' * 1000)|indent(10**8)", "range(99999)|join('x' * 100000)", "('x' * 99999).replace('', 'y' * 99999)", "lipsum(10**9)",
        "5|round(-10**9)", "[1]|batch(10**9, 'x')|list", "[1]|slice(10**9)|list", "([[1]] * 90000)|sum(start=[])", "(5).to_bytes(10**10, 'big')",
        "'x'.encode().center(10**10)", "('\t' * 100).expandtabs(10**9)", "('a' * 99999).translate({97: 'b' * 99999})", "[1]|tojson(indent=10**9)",
        "('a ' * 99999)|wordwrap(1, wrapstring='x' * 99999)", "('x' * 1000000)|wordwrap(1)", "('<!---->' * 99999)|striptags", "('a@' * 50000)|urlize", "('f' * 9999999)|int(0, 16)",
        "'x' * 2000000", "'\\ud800'", "raise_exception('no')", "strftime_now(5)", "''.__class__.__mro__", "messages.append(1)",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_templates_are_rendered_as_by_transformers(name: str) -> None:
    words = tiny_tokenizer()
    words.chat_template = REAL[name]
    template = ChatTemplate.of(words)
    assert template is not None
    for chat in CHATS:
        for answer in (False, True):
            for tools in (None, TOOLS):
                try:
                    right = words.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=answer)
                except Exception:
                    with pytest.raises(SourceError, match="chat template"):
                        template.render(chat, answer, tools)
                else:
                    assert template.render(chat, answer, tools) == right


def test_a_long_conversation_is_rendered_and_a_turn_is_quick() -> None:
    template = ChatTemplate(REAL["thinking"], {})
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 400} for i in range(600)]
    assert len(template.render(chat)) > 1_200_000
    start = perf_counter()
    for _ in range(20):
        template.render(CHATS[1], answer=True)
    assert (perf_counter() - start) / 20 < 0.05  # 1 ms where nothing else runs


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_fail_or_never_end_are_refused_in_a_sentence(name: str) -> None:
    start = perf_counter()
    with pytest.raises(
        SourceError, match="chat template of this model does not take this conversation: .*; give"
    ) as caught:
        ChatTemplate(ENDLESS[name], {"bos_token": "<s>"}).render(CHATS[0], answer=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert perf_counter() - start < 10


@pytest.mark.parametrize(
    "given", [5, True, ["x"], [{"name": "default"}], {"default": 5}, [{"name": "default", "template": None}, 3]]
)
def test_what_is_no_template(given: Any, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": given}))
    words = FolderTokenizer(tmp_path)
    assert words.prompt("the cat", raw=True) == words.encode("the cat")
    with pytest.raises(SourceError, match="chat template"):
        words.prompt("the cat")


@pytest.mark.parametrize("content", [b"\xff\xfe{{ 1 }}", b"x" * (2 << 20), None, b"{# nothing #}"])
def test_files_that_are_no_template(content: bytes | None, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(SourceError, match="chat.template"):
        FolderTokenizer(tmp_path).prompt("the cat")


def test_every_way_to_a_template_has_the_limits() -> None:
    words = tiny_tokenizer()
    words.chat_template = "{{ 'x' * 10**10 }}"
    with pytest.raises(SourceError, match="too much work"):
        AnyTokenizer(words).chat(CHATS[0])
    with pytest.raises(TextError, match="too much work.*leave chat out"):
        render_chat(words, CHATS[0])


WORKER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from lowbit.engine.chat_template import ChatTemplate
from lowbit.errors import SourceError
for number, template in enumerate(json.load(sys.stdin)):
    print(number, flush=True)
    signal.alarm(10)
    try:
        ChatTemplate(template, {"bos_token": "<s>"}).render([{"role": "user", "content": "hello"}], answer=True)
    except SourceError as error:
        assert str(error).isprintable() and len(str(error)) < 500, error
"""


@pytest.mark.parametrize("seed,count", [(0, 150), pytest.param(1, 4000, marks=pytest.mark.slow)])
def test_templates_made_of_nasty_parts(seed: int, count: int) -> None:
    made = mutants(random.Random(seed), count, [*REAL.values(), *(t for t in ENDLESS.values() if len(t) < 5000)])
    done = subprocess.run([sys.executable, "-c", WORKER], input=json.dumps(made), text=True, capture_output=True)
    last = int(done.stdout.split()[-1])
    assert done.returncode == 0, (made[last], done.returncode, done.stderr[-2000:])
