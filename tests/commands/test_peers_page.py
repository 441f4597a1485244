"""The page of benchmarks/peers.py, of runs made up here."""

from pathlib import Path
from types import SimpleNamespace

import pages
import peers
import peers_table
import pytest
from peers import LARGE, SMALL, Contender, Study, Subject
from peers_table import HEAD, TITLES, write

from engine.errors import InputError
from engine.generation import Timings
from engine.kernels.w4.cpu import isas


def contender(name: str, setting: str, prefill: float, decode: float, agreement: float = 1.0):
    """That has run everything at these tokens a second."""
    found = Contender(name, setting, "1.0", run=lambda prompt, new: ([], None))
    for workload, (tokens, new) in SMALL.items():
        steps = (round(1e9 / decode),) * (new - 1)
        ms = tokens / prefill * 1e3
        found.runs[workload].append(Timings(tokens, ms, ms, steps, (1,) * (new - 1)))
    found.agreement = agreement
    return found


@pytest.fixture
def study():
    """Two files by AVX2: ours, llama.cpp in two settings, and ik, whose text is another."""
    made = Study("avx2", {"llama.cpp": None, "ik": None}, repeats=1)
    for name, workloads in (("small", SMALL), ("large", LARGE)):
        model = SimpleNamespace(runtime=SimpleNamespace(threads=3))
        subject = Subject(name, "Q4_0", model, workloads, nbytes=10**9)
        subject.contenders = [
            contender("ours", "", 900, 30),
            contender("llama.cpp", "flash", 300, 10),
            contender("llama.cpp", "no flash", 200, 20),
            contender("ik", "repack", 5000, 500, agreement=0.1),
        ]
        subject.gb_s = [[30.0, 40.0, 60.0]]
        made.subjects.append(subject)
    return made


def test_a_section_has_the_best_of_every_engine(study, tmp_path):
    page, own = tmp_path / "cpu.md", study.subjects[0].contenders[0]
    own.runs["context"] = contender("ours", "", 900, 15).runs["context"]
    write(page, study)
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ") and "## AVX2" in lines
    assert any(", 3 threads, " in line for line in lines)  # which ran, whatever was asked
    ours = next(line for line in lines if line.startswith("| ours | 900"))
    assert ours.split(" | ")[1:] == ["900", "30.0", "15.0", "900", "30.0 |"]
    theirs = next(line for line in lines if line.startswith("| llama.cpp | 300"))
    assert theirs.split(" | ")[1:3] == ["300 (3.00x)", "20.0 (1.50x)"]
    assert "| ik | - | - | - | - | - |" in lines  # no speed of a wrong text
    single = "| llama.cpp | no flash | 200 | 4.50x | 20.0 | 1.50x |"
    assert any(line.startswith(single) for line in lines)
    assert any("At a context of 1,024 tokens it runs at 0.50 of its speed." in x for x in lines)
    (line,) = (line for line in lines if line.startswith("Our decode") and "context" not in line)
    assert "Our decode reads 30.0 GB/s of weights" in line and "40.0 (40.0-40.0) GB/s" in line
    assert "takes 75 (75-75) %" in line and "at 60.0 GB/s, 50%" in line
    study.subjects[1].alone = False  # other bits of a model that is there already
    write(page, study)
    assert "| ours | 900 | 30.0 | 15.0 |" in page.read_text().splitlines()


def test_sections_of_other_instruction_sets_stay(study, tmp_path):
    page = tmp_path / "cpu.md"
    write(page, study)
    study.isa = "amx"
    write(page, study)
    study.subjects = study.subjects[:1]
    study.isa = "avx2"
    write(page, study)
    text = page.read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## AMX", "## AVX2"]
    amx, avx2 = text.split("\n## ")[1:]
    assert "### large, Q4_0 by AMX" in amx and "### large" not in avx2


@pytest.mark.parametrize("isa", ["amx", "avx512", "avxvnni", "avx2"])
def test_what_is_written_by_hand_stays(study, isa, tmp_path, monkeypatch):
    """Of our own page; and where its section is another processor's, that too, behind the mark."""
    recorded = (Path(peers.__file__).parent / "results" / "cpu.md").read_text()
    before = recorded.split(f"\n## {TITLES[isa]}\n")[1].split("\n## ")[0]
    generated, mark, by_hand = before.partition(f"\n{pages.BY_HAND}\n")
    assert mark and "\nVersions: " in generated
    others = [part for part in recorded.split("\n## ")[1:] if not part.endswith(before)]
    study.isa = isa
    for processor in (generated.strip().partition(", ")[0], "Another"):
        monkeypatch.setattr(peers_table, "processor", lambda name=processor: name)
        page = tmp_path / f"{processor}.md"
        page.write_text(recorded)
        for _ in range(2):
            write(page, study)
            text = page.read_text()
            section = text.split(f"\n## {TITLES[isa]}\n")[1].split("\n## ")[0]
            made, _, kept = section.partition(f"\n{pages.BY_HAND}\n")
            assert made.startswith(f"\n{processor}, 3 threads, ")
            moved = generated if processor == "Another" else ""
            assert kept.rstrip("\n") == f"{moved}{by_hand}".rstrip("\n")
            assert all(part in text for part in others)


def test_a_section_without_the_mark_stays_whole():
    assert pages.renewed("mine\n", "made", "mi") == f"made\n\n{pages.BY_HAND}\n\nmine"


@pytest.mark.parametrize(
    "text, found",
    [
        ("# Notes\n\nmine\n", "another page"),
        ("", "another page"),
        ("{head}\n\n## Own heading\n\nmine\n", "the section 'Own heading'"),
        ("{head}\n\n## AMX\n\nmine\n\n## AMX\n\nmine\n", "'AMX' comes twice"),
    ],
)
def test_a_page_of_another_kind_is_kept(text, found, study, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(text.replace("{head}", HEAD.partition("\n")[0]))
    before = page.read_text()
    with pytest.raises(InputError, match=f"page.md: .*{found}"):
        write(page, study)
    for out, sentence in ((page, found), (tmp_path / "no" / "o.md", "there is no directory")):
        monkeypatch.setattr("sys.argv", ["peers.py", "--out", str(out)])
        monkeypatch.setattr(Study, "run", lambda *_: pytest.fail("it was measured"))
        with pytest.raises(SystemExit) as ended:
            peers.main()
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.skipif(isas()[0] == "generic", reason="there is nothing above portable C++ here")
def test_peers_are_held_to_what_can_hold_them():
    with pytest.raises(InputError, match="--isa generic: nothing holds the peers to it"):
        Study("generic", {"transformers": None}, repeats=1)


def test_a_peer_with_avx512_is_no_peer_of_avx2(monkeypatch):
    from contextlib import ExitStack, nullcontext

    monkeypatch.setattr(peers, "work_of", lambda *_: {})
    monkeypatch.setattr(peers, "Peer", lambda *_: nullcontext(SimpleNamespace(wide=True)))
    asked = Study("avx2", {"llama.cpp": None}, repeats=1)
    with ExitStack() as stack, pytest.raises(InputError, match="built for AVX-512; build another"):
        list(asked._opened("llama.cpp", None, stack))


def test_what_is_measured_is_on_the_page_before_the_next_file(study, tmp_path, monkeypatch):
    page = tmp_path / "cpu.md"
    small = study.subjects[0]

    def measured(self, name, bits, path, *_, **__):
        if not self.subjects:
            self.subjects.append(small)
            return small
        assert "### small, Q4_0 by AVX2" in page.read_text()
        raise InputError("no room")

    monkeypatch.setattr(Study, "_measured", measured)
    monkeypatch.setattr(Study, "_quantize", lambda *_: True)
    monkeypatch.setattr(peers, "locate", Path)
    monkeypatch.setattr(peers, "stored", lambda _: "Q4_0")
    monkeypatch.setattr(peers, "perplexity", lambda _: 20.0)
    monkeypatch.setattr(peers, "isas", lambda: ["avx2"])
    monkeypatch.setattr("sys.argv", ["peers.py", "--isa", "avx2", "--out", str(page)])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2 and "20.000" in page.read_text()


def test_bits_are_those_of_the_file(default_model, source):
    assert peers.stored(default_model) == "Q4_1"
    assert peers.stored(source("llama").path) == "float32"
