# ruff: noqa: E501 (a template's line breaks are part of it)
"""Chat templates in the styles that are about, written for the tests: each uses other parts of the language."""

from __future__ import annotations

from typing import Any

__all__ = ["CHATS", "TEMPLATES", "TOOLS"]

CHATML = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content | default('', true)) + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

{{ 'Today: ' + (date_string if date_string is defined else 'never') }}
{%- if tools is not none %}
{{ '\\nTools:' }}
{%- for tool in tools %}
{{ tool | tojson(indent=4) }}
{%- endfor %}
{%- endif %}
{{ system }}<|eot_id|>
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
    {%- if not message.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
    {%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
{{- message.content | tojson }}
{%- else %}
{{- message.content }}
{%- endif %}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] in ('tool', 'system') %}{% continue %}{% endif %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) and false %}{{ raise_exception('roles') }}{% endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' ~ message['content'] ~ ' [/INST]' }}
{%- elif message.content %}{{ ' ' ~ message['content'] | trim ~ eos_token }}{% endif %}{% endfor %}
"""

TOOL_LIST = """\
{%- set ns = namespace(last=-1, seen=[]) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}[AVAILABLE_TOOLS] [
{%- for tool in tools %}
{%- set tool = tool.function %}
{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != 'return' %}
{{- '"' + key + '": ' + (('"' + val + '"') if val is string else val | tojson) }}{{ ', ' if not loop.last }}
{%- endfor %}{{ '}}' }}{{ '' if loop.last else ', ' }}
{%- endfor %}][/AVAILABLE_TOOLS]
{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}
{%- elif m.role == 'tool' %}[RESULT {{ ns.seen | length }}] {{ m.content | string | upper }}
{%- set ns.seen = ns.seen + [m.name] %}
{%- elif loop.index0 == ns.last %}[LAST]{{ m.content }}
{%- else %}[{{ m.role | capitalize }}]{{ m.content }}
{%- endif %}
{%- endfor %}{{ ns.seen | join('|') }}
"""

THINKING = """\
{%- macro text(content) %}
{%- if content is string %}{{ content }}
{%- else %}{% for part in content or [] %}{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}
{%- endif %}
{%- endmacro %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- users | length }} of {{ messages | length -}}
{%- for message in messages[::-1] %}
{%- set content = text(message.content) %}
{%- set reasoning = '' %}
{%- if message.reasoning_content is defined %}{% set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{% if loop.first %}*{% endif %}{{ message.role }}: <think>{{ reasoning.strip() }}</think>{{ content }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>' }}{% endif %}
"""

BLOCKS = """\
{% for message in messages %}
    {% if message.role == "assistant" %}
        {% generation %}
            {{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {% else %}
    # a comment {# which is none #}
<|{{ message.role }}|> {{ message.content }}
    {% endif %}
{% else %}
nothing
{% endfor %}
{% if add_generation_prompt -%}
    <|assistant|>
{%- endif -%}
"""

FORMATTING = """\
{%- set roles = {'user': 'U', 'assistant': 'A', "tool": 'T'} -%}
{%- for message in messages -%}
{{ "%s(%02d)" | format(roles.get(message['role'], '?'), loop.index) }}={{ "{}:{:>4}".format(loop.revindex, loop.length) }}
{%- if message.content is string %} {{ message.content.replace('e', '3') | replace('a', '4') | indent(2) }}{% endif %}
{%- if not loop.last %}{{ ', ' * 2 }}{% endif %}
{%- endfor -%}
{{ messages | map(attribute='role') | unique | sort | join('+') }}{{ roles | dictsort | tojson }}
{{ [1, 2, 3] | sum }} {{ 2 ** 10 }} {{ 7 // 2 }} {{ -3 % 2 }} {{ 1 / 4 }} {{ range(3) | list }} {{ (1, 'a') }}
{{- [[1], [2, 3]] | sum(start=[]) }}{{ 3.14159 | round(2) }}{{ none }}{{ missing }}{{ true }}{{ [none, 1.0, 'é'] | tojson }}
"""

HERMES = """\
{%- macro kind(spec) -%}
{%- if spec.type == 'array' -%}list[{{ kind(spec['items']) }}]
{%- elif spec.type == 'object' -%}dict
{%- else -%}{{ {'string': 'str', 'integer': 'int', 'number': 'float'}.get(spec.type, 'Any') }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for tool in tools or [] %}
{%- set f = tool.function if tool.function else tool %}
def {{ f.name }}(
{%- for name, spec in f.parameters.properties | items -%}
{{ name }}: {{ kind(spec) }}{% if name not in f.parameters.required %} = None{% endif %}{% if not loop.last %}, {% endif %}
{%- endfor %}): {{ f.description | trim | lower | title }}
{%- endfor %}
{% for message in messages %}<|{{ message.role }}|>{{ message.content | tojson }}
{% endfor %}
"""

COMMAND = """\
{%- if messages | length > 0 and messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set head = messages[0].content %}
{%- else %}{% set loop_messages = messages %}{% set head = none %}{% endif %}
{%- for m in loop_messages | rejectattr('role', 'in', ['tool']) %}
{%- if loop.first and head is not none %}<<SYS>>{{ head.upper() }}<</SYS>>{% endif %}
{%- set who = {'user': 'Human', 'assistant': 'Assistant'}[m.role] | default(m.role) %}
{%- if loop.previtem is defined and loop.previtem.role == m.role %}(again){% endif %}
{{ who }}: {{ (m.content or '').splitlines() | map('trim') | select | join(' / ') }}
{%- endfor %}
{%- with end = 'Assistant:' %}{% if add_generation_prompt %}
{{ end }}{% endif %}{% endwith %}
"""

DOCUMENTS = """\
{%- if documents %}{% for d in documents %}<doc {{ loop.index }}>{{ d.title }}: {{ d.text | truncate(20) | e }}</doc>{% endfor %}{% endif %}
{%- set bos = bos_token if bos_token is defined else '' -%}
{%- filter upper %}{% for m in messages %}{{ loop.cycle('<', '>') }}{{ m.role }}{% endfor %}{% endfilter %}
{%- set body %}{% for m in messages %}{{ m.content if m.content is string else '...' }};{% endfor %}{% endset %}
{{ body | wordcount }} {{ body | reverse | first }} {{ bos }} {{ body[:10] }} {{ body[-3:] }}
{%- call(x) wrapped('y') %}[{{ x }}]{% endcall %}
{%- macro wrapped(z) %}{{ caller(z) if caller }}{% endmacro %}
"""
DOCUMENTS = DOCUMENTS.replace(
    "{%- call(x)", "{%- macro wrapped(z) %}{{ caller(z) }}{% endmacro %}{% call(x)", 1
)
DOCUMENTS = DOCUMENTS.rpartition("{%- macro wrapped(z) %}{{ caller(z) if caller }}")[0]

BATCHES = """\
{%- for pair in messages | batch(2) %}{{ loop.index }}:{% for m in pair %}{{ m.role[0] }}{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %};{% endfor %}
{%- for group in messages | groupby('role') %}{{ group.grouper }}={{ group.list | length }} {% endfor %}
{%- for k in messages[0] %}{{ k }},{% endfor %}
{%- for key, value in messages[0] | dictsort %}{{ key }}:{{ value | string | length }}{% endfor %}
{{- messages[0].keys() | list }}{{ 'user' in messages | map(attribute='role') }}{{ messages | first == messages[0] }}
{{- (messages | last).content is none }}{{ '1' | int + 2 }}{{ '2.5' | float }}{{ 'a,b' .split(',') }}{{ messages[0].nothing is defined }}
"""

RECURSIVE = """\
{%- for item in [[1, [2]], [3]] recursive %}({{ loop(item) if item is iterable else item }}@{{ loop.depth }}){% endfor %}
{%- set sep = joiner(', ') %}{% for m in messages %}{{ sep() }}{{ m.role }}{% endfor %}
{%- set turn = cycler('odd', 'even') %}{% for m in messages %}{{ turn.next() }}{% endfor %}
{%- for m in messages %}{% if loop.changed(m.role) %}{{ loop.nextitem.role if loop.nextitem is defined else '.' }}{% endif %}{% endfor %}
{{- '' if messages | selectattr('role', 'equalto', 'nobody') else 'none' }}
{{- dict(a=1, **{'b': 2}) }}{{ namespace(x=3).x }}{{ 5 is odd and 'a' is lower and 3 is divisibleby 3 }}{{ [3, 1, 2] | sort(reverse=true) }}
{{- 'abc' | list }}{{ {'a': [1, {'b': none}]} | tojson(indent=2, sort_keys=true, separators=(',', ': ')) }}{{ 1 < 2 < 3 }}{{ 'a' 'b' ~ 1 ~ none }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "tool_list": TOOL_LIST,
    "thinking": THINKING,
    "blocks": BLOCKS,
    "formatting": FORMATTING,
    "hermes": HERMES,
    "command": COMMAND,
    "documents": DOCUMENTS,
    "batches": BATCHES,
    "recursive": RECURSIVE,
}

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}},
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hello there, <b>you</b>"}],
    "turns": [
        {"role": "system", "content": "  Be brief.\n"},
        {"role": "user", "content": "What is\n  2 + 2? {{ 7 * 7 }}"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\nFour — 4 ✓"},
        {"role": "user", "content": "And again?"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "easy"},
        {"role": "user", "content": "Thanks"},
    ],
    "none": [
        {"role": "user", "content": "x", "name": None},
        {"role": "assistant", "content": "y", "tool_calls": None, "thinking": "hm"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": " the Weather of a city ",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "time", "description": "now", "parameters": {"properties": {}, "required": []}},
    },
]
