"""`engine chat`: the conversation grows, its commands, what cannot be answered."""

import io
import os
import pty
import signal
import stat
import subprocess
import sys

import pytest
from support.commands import call
from support.fake import FakeRuntime, FakeText

from engine.api import Model
from engine.commands import chat, common
from engine.errors import InputError

LETTERS = [chr(ord("a") + i % 26) for i in range(64)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model whose tokenizer notes the conversations it is given."""
    made = Model(tmp_path, FakeRuntime(1))
    made.__dict__["text"] = text = FakeText(LETTERS, chat_template="x")
    text.asked = []
    plain = text.chat
    text.chat = lambda messages: text.asked.append(messages) or plain(messages)
    monkeypatch.setattr(common, "open_model", lambda *_, **__: (made, 1.0))
    return made


def talk(monkeypatch, *lines: str, options=("--new-tokens", 5)) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return call("chat", "any", *options)


def roles(conversation) -> str:
    return "".join(message["role"][0] for message in conversation)


def test_what_was_said_is_kept(model, monkeypatch):
    options = ["--new-tokens", 5, "--system", "be brief"]
    code, out, err = talk(monkeypatch, "a", "", "bc", options=options)
    assert (code, err) == (0, "")
    answers = out.splitlines()
    assert [len(answer) for answer in answers] == [5, 5]
    first, second = model.text.asked
    assert (roles(first), roles(second)) == ("su", "suau")
    assert second[2] == {"role": "assistant", "content": answers[0]}


def test_options_reach_the_model_and_its_answers(model, monkeypatch):
    opened, asked = [], []
    monkeypatch.setattr(
        common, "open_model", lambda *_, **given: (opened.append(given), (model, 1.0))[1]
    )
    monkeypatch.setattr(Model, "stream", lambda *_, **given: iter([asked.append(given) or "a"]))
    options = ("--isa", "avx2", "--speculate", "ngram", "--seed", 3, "--temperature", 0.5)
    assert talk(monkeypatch, "b", options=options)[0] == 0
    assert opened[0]["isa"] == "avx2"
    assert (asked[0]["speculate"], asked[0]["seed"]) == ("ngram", 3)
    code, _, err = talk(monkeypatch, "b", options=("--speculate", "draft"))
    assert code == 2 and "speculate: expected one of ngram, found 'draft'" in err


def test_commands(model, monkeypatch):
    said = ["a", "/reset", "b", "c", "/undo", "d", "/system e", "/undo", "f", "/system", "g"]
    said += ["/exit", "h"]
    code, _, err = talk(monkeypatch, *said)
    assert (code, err) == (0, "")
    assert [roles(each) for each in model.text.asked] == ["u", "u", "uau", "uau", "su", "u"]
    assert model.text.asked[3][-1]["content"] == "d"


def test_help_and_unknown_commands(model, monkeypatch):
    _, out, _ = talk(monkeypatch, "/help", "/what")
    assert chat.HELP in out and "/what: there is no such command" in out
    assert not model.text.asked


def test_a_full_context_is_said_and_the_conversation_goes_on(model, monkeypatch):
    code, out, err = talk(monkeypatch, "a", "b" * 300, "c")
    assert code == 0 and len(out.splitlines()) == 2
    assert "context" in err and "/reset" in err and err.count("\n") == 1
    assert roles(model.text.asked[2]) == "uau"


def test_reset_is_told_where_it_helps(model, monkeypatch):
    def refuse(messages):
        raise InputError("no system role")

    model.text.chat = refuse
    _, _, err = talk(monkeypatch, "a", options=["--new-tokens", 5, "--system", "be brief"])
    assert err == "engine: no system role\n"


def test_a_system_message_that_the_template_refuses_can_be_taken_back(model, monkeypatch):
    def refuse(messages):
        if roles(messages).startswith("s"):
            raise InputError("no system role")
        return [5, 6]

    model.text.chat = refuse
    assert "/system X   " in chat.HELP and "with none where X is left out" in chat.HELP
    code, out, err = talk(monkeypatch, "/system e", "a", "/system", "b")
    assert (code, err) == (0, "engine: no system role\n")
    assert len(out.splitlines()) == 1


def test_an_answer_has_half_of_a_short_context(model, monkeypatch):
    code, out, err = talk(monkeypatch, "a", options=())
    assert (code, err) == (0, "")
    assert len(out.strip()) == model.config.max_context // 2 < chat.ANSWER


def test_a_line_that_is_no_text_is_left_out(model, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"a\n\xff\nb\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    code, out, err = call("chat", "any", "--new-tokens", 5)
    assert code == 0 and len(out.splitlines()) == 2
    assert err == "engine: a line was not UTF-8 and is left out\n"
    assert roles(model.text.asked[1]) == "uau"


def test_no_template(model, monkeypatch):
    model.text.chat_template = None
    code, _, err = talk(monkeypatch, "a")
    assert code == 2 and "any: has no chat template" in err


def test_answers_longer_than_the_context_are_refused(model, monkeypatch):
    code, _, err = talk(monkeypatch, "a", options=["--new-tokens", 256])
    assert code == 2 and "--new-tokens: expected less than the context's 256" in err


def test_options_are_refused_before_the_model_opens(monkeypatch):
    monkeypatch.setattr(common, "open_model", lambda *_, **__: pytest.fail("opened"))
    code, _, err = talk(monkeypatch, "a", options=["--temperature", "-1"])
    assert code == 2 and "temperature must be" in err
    code, _, err = talk(monkeypatch, "a", options=["--top-p", "0.9"])
    assert code == 2 and "--top-p: has no effect at --temperature 0" in err


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_a_standard_stream_that_is_closed(closed, model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    monkeypatch.setattr(f"sys.{closed}", None)
    assert not list(chat.lines())


LINES = """
import signal
from engine.commands.chat import lines
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has its programs ignore
for line in lines():
    print("heard", line, flush=True)
"""


def test_conversations_share_a_history(tmp_path):
    """Of two at once, and of a terminal that is closed; in the end its latest lines alone."""

    def converse() -> tuple[subprocess.Popen, int]:
        ours, theirs = pty.openpty()
        heard = subprocess.Popen(
            [sys.executable, "-c", LINES], stdin=theirs, stdout=theirs, stderr=theirs,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        return heard, ours

    def say(ours: int, line: str) -> None:
        os.write(ours, f"{line}\n".encode())
        seen = b""
        while f"heard {line}".encode() not in seen:
            seen += os.read(ours, 4096)

    first, second = converse(), converse()
    say(first[1], "one")
    say(second[1], "two")
    say(first[1], "three")
    for heard, ours in (second, first):
        heard.send_signal(signal.SIGHUP)
        heard.wait(20)
        os.close(ours)
    file = tmp_path / "shallow" / "chat_history"
    assert file.read_text() == "one\ntwo\nthree\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600  # nobody else's to read
    file.write_text("".join(f"{number}\n" for number in range(chat.LINES)))
    third = converse()
    say(third[1], "four")
    third[0].send_signal(signal.SIGHUP)
    third[0].wait(20)
    os.close(third[1])
    assert file.read_text().split()[::999] == ["1", "four"]


def test_options_reach_the_answer(model, monkeypatch):
    seen, real = [], Model.stream

    def stream(self, *asked, **options):
        seen.append(options)
        return real(self, *asked, **options)

    monkeypatch.setattr(Model, "stream", stream)
    given = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 7}
    options = [
        word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    assert talk(monkeypatch, "a", options=["--new-tokens", 5, *options])[0] == 0
    (found,) = seen
    assert {name: found[name] for name in given} == given
