"""Chat templates that try to get out, never end or never fit; and what must not be seen of the interpreter."""

from __future__ import annotations

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

ENDLESS = [
    LOOP,
    "{{ 'a' * 10**9 }}",
    "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% set ns = namespace(x='a' * 1000) %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ (9 ** 9999999) | string | length }}",
    "{{ '%999999999d' | format(1) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ range(99999) | list | tojson * 999 }}",
]
"""Each takes more time, memory or text than there is."""

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages|attr('__init__')|attr('__globals__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "{{ ('{0.__class__}'|attr('format'))(messages) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__func__ }}",
    "{{ strftime_now.__closure__[0].cell_contents }}",
    "{{ strftime_now.__globals__['sys'].modules }}",
    "{{ (messages|tojson).__class__ }}",
    "{% set x = messages.append({'role': 'x', 'content': 'PWNED'}) %}{{ x }}",
    "{% for m in messages %}{{ m.update({'a': 1}) }}{% endfor %}",
    "{{ lipsum.__globals__ }}",
    "{{ (lipsum|string)[:5] }}{{ lipsum() }}",
    "{{ joiner.__init__.__globals__['__builtins__'] }}",
    "{{ dict.__base__ }}{{ dict.mro() }}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% include '/etc/passwd' %}",
    "{{ (messages|groupby('__class__'))|list }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|sum(attribute='__class__.__name__') }}",
    "{% for x in (1,) %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func }}{{ m._environment }}",
    "{{ (messages|select|list|first).__class__ }}",
    "{% set g = (messages|map('upper')) %}{{ g.gi_frame.f_globals }}{{ g.gi_code }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ get_flashed_messages.__globals__ }}{{ config }}{{ request.application }}",
]

LEAKS = ("<class", "<function", "root:", "PWNED", "<module", "<frame", "<code")
