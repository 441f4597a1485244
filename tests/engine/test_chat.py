"""Chat templates render as in transformers; bad messages and bad templates are one sentence."""

import json
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.versions import skip_before
from support.vocabularies import SPECIAL, byte_level

from engine.errors import InputError
from engine.text import Text, chat, load_text
from engine.text.template import allow_seconds

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <|user|> 12\n", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"é": 1}}]},
    {"role": "user", "content": [{"type": "text", "text": "<b>done</b>"}]},
]
TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m.content }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|user|>assistant\n{% endif %}",
    "blocks": """
    {%- for message in messages %}
        {%- if loop.first %}
            {{- bos_token }}
        {%- endif %}
        {% if message.role == 'assistant' %}
            {% continue %}
        {% endif %}
        {{ message | tojson(indent=2) }} {{ message.content is string }}
    {%- endfor %}
    """,
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 2 %}{% break %}{% endif %}{{ ns.n }}{{ m.content | trim }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}"
    "{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ tools is none }}{{ pad_token }}{{ unk_token }}",
    "macros": "{% macro f(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ f(m.role) }}"
    "{{ ' ' * loop.index }}{{ 99999 * 99999 }}{{ dict(a=1) | tojson }}{% endfor %}",
}


def text_with(template: str | None) -> Text:
    tokenizer = byte_level(size=300)
    tokenizer.add_special_tokens(SPECIAL)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Text(tokenizer, "toy", special, (2,), template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_transformers(name):
    if name in ("plain", "blocks"):
        skip_before("5.23", "writes what a message lacks as 'None'")
    text = text_with(TEMPLATES[name])
    other = text.to_transformers()
    assert other.pad_token == "</s>"
    other.pad_token = None  # the run path has none, and templates may ask
    expected = other.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert text.chat(CHAT) == expected
    assert expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_what_a_model_thought_is_read_by_any_name(name):
    """As by transformers since 5.23."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "why"}]
    text = text_with("{{ messages[1].reasoning_content }} {{ messages[1].thinking }}")
    assert text.render(said) == "why why"


MANY_FILES = """
import os, resource
from engine.text.chat import render
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
held = [os.dup(0) for _ in range(1100)]
print(render("{{ messages[0].content }}", [{"role": "user", "content": "heard"}], {}, "here"))
"""


def test_a_process_with_many_open_files():
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1200:
        pytest.skip("this system allows a process fewer open files")
    done = subprocess.run([sys.executable, "-c", MANY_FILES], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("heard\n", "")


BESIDE = """
import sys
from pathlib import Path
sys.path.append(Path("elsewhere"))
from engine.text.chat import render
print(render("{{ messages[0].content }}", [{"role": "user", "content": "heard"}], {}, "here"))
"""


def test_a_program_with_modules_and_paths_of_its_own(tmp_path):
    """One named as the system's `resource` is not taken for it; a Path is none of Python's."""
    (tmp_path / "resource.py").touch()
    (tmp_path / "program.py").write_text(BESIDE)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_templates_of_a_directory(tmp_path):
    """chat_template.jinja, else the config's, else its default of several."""
    byte_level(size=300).save(str(tmp_path / "tokenizer.json"))
    named = [{"name": name, "template": name} for name in ("tool_use", "default")]
    for config, template in (
        ({}, None),
        ({"chat_template": named[:1]}, None),
        ({"chat_template": named}, "default"),
        ({"chat_template": "one"}, "one"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_text(tmp_path).chat_template == template
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_text(tmp_path).chat_template == "file"


def test_no_template():
    with pytest.raises(InputError, match="^toy: has no chat template"):
        text_with(None).chat(CHAT)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ("hello", "a list of"),
        ({"role": "user"}, "a list of"),
        (["hello"], "message 0: expected a dict"),
        ([{"content": "x"}], "'role'"),
        ([{"role": 3, "content": "x"}], "'role'"),
        ([{"role": "user", "content": 3}], "'content'"),
        ([{"role": "user", "content": object()}], "plain JSON"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "plain JSON"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
    ],
)
def test_malformed_messages(messages, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        text_with(TEMPLATES["plain"]).chat(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ (-9) ** 63 ** 63 % 7 }}",
        "{% set a = ['x'] * 99999 %}{{ (a * 99999) | length }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'other' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_failing_and_hostile_templates(template):
    with pytest.raises(InputError, match="^toy: the chat template fails") as error:
        text_with(template).chat(CHAT)
    assert "\n" not in str(error.value)


def test_a_template_that_prints_without_end():
    endless = "{% for i in range(99999) %}{{ 'x' * 999999 }}{% endfor %}"
    with pytest.raises(InputError, match="it prints more than 16777216 characters"):
        text_with(endless).chat(CHAT)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such limit")
def test_a_template_that_fills_memory():
    doubled = "{% set ns.x = ns.x ~ ns.x %}"
    template = f"{{% set ns = namespace(x='x') %}}{{% for i in range(31) %}}{doubled}{{% endfor %}}"
    with pytest.raises(InputError, match="it takes more than 512 MB of memory"):
        text_with(template).render(CHAT)


SLOW = "{% for i in range(99999) %}{% for j in range(200) %}{% endfor %}{% endfor %}late"


def test_a_chat_after_one_that_takes_too_long(monkeypatch):
    """It gets its own answer, and not that which comes too late."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match="it takes more than"):
        patch.setattr(chat, "SECONDS", 0.2)
        text_with(SLOW).render(CHAT)
    assert text_with("soon").render(CHAT) == "soon"


def test_a_chat_after_one_that_was_interrupted():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            text_with(SLOW).render(CHAT)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert text_with("soon").render(CHAT) == "soon"


def test_a_chat_after_the_helper_was_killed():
    """By a system that is short of memory, say."""
    assert text_with("one").render(CHAT) == "one"
    helper = chat._helper._process
    helper.kill()
    helper.wait()
    assert text_with("two").render(CHAT) == "two"


def test_every_chat_has_its_seconds(monkeypatch):
    """However many the helper has used for those before."""
    limits = []
    used = SimpleNamespace(ru_utime=100.5, ru_stime=20.5)
    monkeypatch.setattr(resource, "getrusage", lambda _: used)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit[0]))
    allow_seconds(5)
    assert limits == [pytest.approx(126.5, abs=0.5)]


FORKED = f"""
import os, signal, threading, time
from engine.text.chat import render
said = [{{"role": "user", "content": "a"}}]
threading.Thread(target=render, args=({SLOW!r}, said, {{}}, "here"), daemon=True).start()
time.sleep(0.2)
if (child := os.fork()) == 0:
    signal.alarm(20)
    os._exit(render("soon", said, {{}}, "here") != "soon")
print(os.waitpid(child, 0)[1], flush=True)
os._exit(0)  # or its thread may still say that the helper, which an exit kills, gave no answer
"""


def test_a_program_that_forks_while_a_thread_chats():
    command = sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED  # of such a fork
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
