# ruff: noqa: E501 (a template's line breaks are part of it)
"""Templates that mean harm: to fill the memory, to run for ever, or to reach what is not theirs."""

from __future__ import annotations

__all__ = ["ESCAPES", "EXHAUSTING"]

DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = WHAT %}{% endfor %}{{ ns.x | length }}"
BIG = "{% set big = 'x' * 1500000 %}"

EXHAUSTING = {
    # loops
    "nested_loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered_loops": "{% for a in range(99999) if false %}{% endfor %}" * 400,
    "loops_in_filters": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "unrolled_filters": "{{ range(99999) | map('string') | list | length }}" * 400,
    "large_range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "recursive_loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "recursive_macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching_macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller_loop": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 18
    + "x"
    + "{% endcall %}" * 18
    + "{% for i in range(99999) %}{% call f() %}{% call f() %}{% call f() %}x{% endcall %}{% endcall %}{% endcall %}{% endfor %}",
    "cycler": "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    # text
    "repeated_text": "{{ 'x' * 10 ** 9 }}",
    "repeated_text_reversed": "{{ 10 ** 9 * 'x' }}",
    "doubling_plus": DOUBLING.replace("WHAT", "ns.x + ns.x"),
    "doubling_tilde": DOUBLING.replace("WHAT", "ns.x ~ ns.x"),
    "doubling_join": DOUBLING.replace("WHAT", "[ns.x, ns.x] | join"),
    "doubling_str_join": DOUBLING.replace("WHAT", "ns.x.join([ns.x, ns.x])"),
    "doubling_replace": DOUBLING.replace("WHAT", "ns.x | replace('a', ns.x)"),
    "doubling_str_replace": DOUBLING.replace("WHAT", "ns.x.replace('', ns.x)"),
    "doubling_format": DOUBLING.replace("WHAT", "'{0}{0}'.format(ns.x)"),
    "doubling_format_map": DOUBLING.replace("WHAT", "'{a}{a}'.format_map({'a': ns.x})"),
    "doubling_percent": DOUBLING.replace("WHAT", "'%s%s' % (ns.x, ns.x)"),
    "doubling_format_filter": DOUBLING.replace("WHAT", "'%s%s' | format(ns.x, ns.x)"),
    "doubling_macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("WHAT", "f(ns.x)"),
    "doubling_list": DOUBLING.replace("WHAT", "[ns.x, ns.x]").replace("| length", ""),
    "doubling_tuple": DOUBLING.replace("WHAT", "(ns.x, ns.x)").replace("| length", "in {}"),
    "doubling_dict": DOUBLING.replace("WHAT", "{'a': ns.x, 'b': ns.x}").replace("length", "tojson"),
    "doubling_dict_call": DOUBLING.replace("WHAT", "dict(a=ns.x, b=ns.x)").replace("length", "string"),
    "doubling_namespace": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [namespace(x=ns.x), ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "doubling_set": "{% set a = 'xy' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60 + "{{ a | length }}",
    "doubling_filter_block": "{% macro f(x) %}{% filter upper %}{{ x }}{{ x }}{% endfilter %}{% endmacro %}"
    + DOUBLING.replace("WHAT", "f(ns.x)"),
    "doubling_sum": DOUBLING.replace("'ab'", "['ab']").replace("WHAT", "[ns.x, ns.x] | sum(start=[])"),
    "literal_in_loop": "{% set a %}{% for i in range(99999) %}" + "text " * 1000 + "{% endfor %}{% endset %}",
    "long_output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "width_percent": "{{ '%1000000000d' % 1 }}",
    "width_percent_star": "{{ '%*d' % (1000000000, 1) }}",
    "width_percent_precision": "{{ '%.999999999f' % 1 }}",
    "width_format": "{{ '{:>1000000000}'.format(1) }}",
    "width_format_nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "width_format_filter": "{{ '%1000000000s' | format('x') }}",
    "width_center": "{{ 'x'.center(1000000000) }}",
    "width_ljust": "{{ 'x'.ljust(1000000000) }}",
    "width_zfill": "{{ 'x'.zfill(1000000000) }}",
    "width_tabs": "{{ ('\\t' * 1000).expandtabs(1000000) }}",
    "width_indent": "{{ ('\\n' * 1000000) | indent(1000) }}",
    "width_indent_text": "{{ ('\\nx' * 1000) | indent('x' * 10000) }}",
    "width_batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "width_slice": "{{ [1] | slice(1000000000) | list }}",
    "width_json": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "width_bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "format_attribute": BIG + "{% set ns = namespace(x=big) %}{{ ('{0.x}' * 1000).format(ns) }}",
    "join_attribute": BIG + "{% set ns = namespace(x=big) %}{{ ([ns] * 1000) | join(attribute='x') }}",
    "map_attribute": BIG + "{% set ns = namespace(x=big) %}{{ ([ns] * 1000) | map(attribute='x') | list }}",
    "percent_mapping": BIG + "{{ ('%(a)s' * 1000) % {'a': big} }}",
    "escape": BIG.replace("x", "<") + "{{ big | e | e | e | e | e }}",
    "many_values": "".join(f"{{% set a{i} = 'x' * 1900000 ~ '{i}' %}}" for i in range(600)),
    "lists_of_text": BIG + "{{ [big] * 90000 }}",
    # numbers
    "power": "{{ 10 ** (10 ** 10) }}",
    "power_filter": "{{ 1.5 | round(1000000000, 'floor') }}",
    "products": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    # slow single steps
    "comparisons": "{% set a = range(90000) | list %}{% set b = range(90000) | list %}{{ "
    + "a == b and " * 60
    + "1 }}",
    "comparisons_in_loop": "{% set a = 'x' * 999999 %}{% set b = 'x' * 999999 %}{% for i in range(99999) %}{% if a == b %}{% endif %}"
    "{% endfor %}",
    "membership": "{% set a = range(90000) | list %}{% for i in range(99999) %}{% if 'x' in a %}{% endif %}{% endfor %}",
    "slices": BIG + "{{ " + "big[::-1] and " * 60 + "1 }}" + "{% if big[::-1] %}{% endif %}" * 400,
    "sorts": "{% for i in range(9999) %}{{ range(90000) | sort(reverse=true) | length }}{% endfor %}",
    "splits": BIG + "{% for i in range(9999) %}{{ big.split('x') | length }}{% endfor %}",
    "counts": BIG + "{% for i in range(99999) %}{{ big.count('xy') }}{% endfor %}",
    # depth
    "deep_list": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "deep_tuple": "{% set ns = namespace(x=()) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "deep_lazy": "{% set ns = namespace(x=['a']) %}{% for i in range(99999) %}{% set ns.x = ns.x | map('upper') %}{% endfor %}"
    "{{ ns.x | list }}",
    "deep_parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep_brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep_minus": "{{ " + "-" * 10000 + "1 }}",
    "deep_not": "{{ " + "not " * 5000 + "1 }}",
    "deep_ifs": "{% if a %}" * 900 + "{% endif %}" * 900,
    "deep_fors": "{% for a in b %}" * 600 + "{% endfor %}" * 600,
    "deep_fors_few": "{% for a in 'ab' %}" * 25 + "{% endfor %}" * 25,
    "deep_filters": "{{ 1" + "|string" * 5000 + " }}",
    "deep_conditions": "{{ " + "1 if 0 else " * 1500 + "1 }}",
    "long_sum": "{{ 1" + "+1" * 7000 + " }}",
    # size of the template itself
    "too_long": "x" * 200_000,
    "too_many_words": "{{a}}" * 15_000,
    "dense": "{%set " + ",".join(f"a{i}" for i in range(3000)) + "=b%}" + "{%if a%}{%endif%}" * 700,
    "never_closed": "{% for a in b %}" + "{{ a " * 10,
    "unknown_tag": "{% do x %}",
    "unknown_filter": "{{ 'x' | nothing }}",
}

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class_item": "{{ ''['__class__']['__mro__'] }}",
    "class_attr": "{{ (''|attr('__class__')).mro() }}",
    "class_format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "class_format_attr": "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(raise_exception) }}",
    "class_format_map": "{{ '{a.__class__.__init__}'.format_map({'a': raise_exception}) ~ ''.__class__ ~ x.y.z }}",
    "class_map": "{{ [''] | map(attribute='__class__.__mro__') | list | first | first }}",
    "function_globals": "{{ raise_exception.__func__.__globals__ }}",
    "environment": "{{ raise_exception.__self__.globals.clear() }}",
    "globals_of_cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "joiner": "{{ joiner.__init__.__globals__['__builtins__'] | first | upper }}",
    "namespace": "{{ namespace.__init__.__globals__.os.listdir('.') }}",
    "namespace_name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "namespace_made": "{{ namespace(__class__='x').x }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._environment.globals.x() }}",
    "self": "{{ self._TemplateReference__context.environment.x() }}",
    "loop": "{% for a in [1] %}{{ loop._iterator.x() }}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from_import": "{% from 'os' import system %}",
    "extends": "{% extends '/etc/passwd' %}",
    "block": "{% block x %}{{ self.x() }}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "mutate_list": "{{ messages.append(1) }}",
    "mutate_dict": "{{ messages[0].update({}) }}",
    "mutate_pop": "{{ messages.pop() }}",
    "dict_class": "{{ dict.mro() }}",
    "encode": "{{ 'x'.encode('rot13') }}",
    "translate": "{{ 'x'.translate({120: 'y' * 1000}) }}",
    "call_text": "{{ 'x'() }}",
    "random": "{{ [1, 2] | random }}",
    "pprint": "{{ [1, 2] | pprint }}",
    "xmlattr": "{{ {'a b': 1} | xmlattr }}",
    "debug": "{% debug %}",
    "trans": "{% trans %}x{% endtrans %}",
}
