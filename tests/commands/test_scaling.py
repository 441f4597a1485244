"""What benchmarks/scaling.py makes of the parts of a step, a model's or made up here."""

import pytest
import scaling
from scaling import SOCKETS, THREADS, Parts, fastest, parts_table, predicted, remark, table
from support import tiny

ONE = Parts(stream=8.0, attention=0.6, barriers=0.0, rest=0.25)
TWO = Parts(stream=4.0, attention=0.3, barriers=0.1, rest=0.25)
NBYTES, ITEMS = 120_000_000, 6  # 2 ms at 60 GB/s


def test_the_parts_of_a_step_are_the_whole_step(tmp_path, monkeypatch):
    tiny.write("llama", tmp_path, 1)
    tiny.save_tokenizer(tmp_path)
    times, generate = [], scaling.generate

    def timed(runtime, text, prompts, options, on_step):
        made = generate(runtime, text, prompts, options, on_step)
        times.append(made[0].timings.step_ns)
        return made

    monkeypatch.setattr(scaling, "generate", timed)
    monkeypatch.setattr(scaling, "fastest", list)
    steps, nbytes, items = scaling.measured(str(tmp_path), 1)
    expected = [ns / 1e6 for each in times for ns in each]
    assert [step.whole for step in steps] == pytest.approx(expected)
    assert all(min(step.stream, step.attention, step.rest) > 0 for step in steps)
    assert nbytes > 0 and items == 4  # two kv heads, and pages of 128 of some 160 positions


def test_the_measured_parts_are_shown():
    lines = parts_table(ONE, TWO)
    assert lines[0] == "| threads | stream | attention | barriers | rest | ms a step |"
    assert lines[2:] == [
        "| 1 | 8.00 | 0.60 | 0.00 | 0.25 | 8.85 |",
        "| 2 | 4.00 | 0.30 | 0.10 | 0.25 | 4.65 |",
    ]


def test_a_thread_that_was_held_up_is_no_barrier():
    held_up = Parts(8.0, 0.6, 20.0, 0.25)
    assert fastest([held_up, ONE, held_up, held_up]) == ONE
    assert fastest([ONE]) == ONE
    two = fastest([held_up] * 6 + [TWO, ONE])
    assert two == Parts(6.0, pytest.approx(0.45), pytest.approx(0.05), 0.25)


def test_what_is_predicted_from_them():
    assert predicted(ONE, TWO, NBYTES, ITEMS, 1, 60.0) is ONE
    assert predicted(ONE, TWO, NBYTES, ITEMS, 2, 60.0) is TWO
    four = predicted(ONE, TWO, NBYTES, ITEMS, 4, 60.0)
    assert four == Parts(2.0, pytest.approx(0.2), pytest.approx(0.2), 0.25)
    many = predicted(ONE, TWO, NBYTES, ITEMS, 32, 60.0)  # an item each, all that memory gives
    assert many == Parts(2.0, pytest.approx(0.1), pytest.approx(0.5), 0.25)


def test_a_row_by_threads_and_a_column_by_memory():
    lines = table(ONE, TWO, NBYTES, ITEMS)
    assert len(lines) == 2 + len(THREADS)
    assert lines[2] == "| 1 |" + " 113 |" * len(SOCKETS)
    assert lines[4].startswith("| 4 | 377 |")


def test_threads_that_others_hold_up_are_no_prediction():
    assert remark(TWO) is None
    said = remark(Parts(stream=4.0, attention=0.3, barriers=4.55, rest=0.25))
    assert said.startswith("Two threads wait for each other for 50% of a step")
