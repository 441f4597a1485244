"""Peers do the same work in processes of their own, which stand still while others run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.fake import FakeText

from engine.api import Model
from engine.benchmark.peers import hf, worker
from engine.benchmark.peers.known import KNOWN, chosen
from engine.benchmark.peers.process import Peer, PeerMissing, fastest, work_of
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.generation import Options, generate
from engine.runtime.reference import ReferenceRuntime


def compare_with_transformers(case, drop, rng, path, generate_theirs):
    """`generate_theirs(model, prompts, new_tokens)` gives ids; they must be the reference's."""
    tiny.write(case, path, int(torch.randint(2**31, (1,), generator=rng)))
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    kept = [layer for layer in range(config.total_layers) if layer not in drop]
    model = Model(path, ReferenceRuntime.load(checkpoint, config.keep(kept)))
    prompts = torch.randint(config.vocab_size, (2, 12), generator=rng).tolist()
    text = FakeText(["x"] * config.vocab_size)
    ours = generate(model.runtime, text, prompts, Options(max_new_tokens=16, ignore_eos=True))
    assert generate_theirs(model, prompts, 16) == [list(result.token_ids) for result in ours]


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi2", "phi3"])
@pytest.mark.parametrize("drop", [(), (1,)])
def test_transformers_gives_the_same_ids(case, drop, rng, tmp_path):
    def theirs(model, prompts, new_tokens):
        engine = hf.Engine(**work_of("transformers", model, 2, 28), setting={})
        return engine.generate(prompts, new_tokens)["ids"]

    compare_with_transformers(case, drop, rng, tmp_path, theirs)


def test_transformers_in_its_process(rng, tmp_path):
    def theirs(model, prompts, new_tokens):
        work = work_of("transformers", model, 2, 28)
        with fastest("transformers", None, work, prompts[0]) as peer:
            ids, timings = peer.generate(prompts, new_tokens)
        assert timings.prompt_tokens == 24 and timings.step_tokens == (2,) * 15
        assert len(timings.step_ns) == 15 and min(timings.step_ns) > 0 and timings.prefill_ms > 0
        return ids

    compare_with_transformers("llama", (1,), rng, tmp_path, theirs)


# A peer in a few lines: as its adapter imports it, and as an interpreter may have it or not.
ADAPTER = """
import os, sys, time

class Engine:
    version = "1.2"

    def __init__(self, setting, **work):
        print("chatter on standard output", flush=True)
        if work.get("module"):
            __import__(work["module"])
        self.setting = setting

    def generate(self, prompts, new_tokens):
        ids = [[len(prompt)] * new_tokens for prompt in prompts]
        step = {"slow": 9, "fast": 3, "middling": 6}[self.setting.get("pace", "slow")]
        return {"ids": ids, "prefill_ns": 5 * 10**6, "step_ns": [step] * (new_tokens - 1)}

    def nll(self, ids):
        if len(ids) == 0:
            time.sleep(60)
        if len(ids) == 1:
            raise RuntimeError("nothing to predict")
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Opens the peer above; its adapter lies where the process finds it."""
    package = tmp_path / "engine" / "benchmark" / "peers"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").touch()
    shutil.copy(worker.__file__, package)
    (package / "fake.py").write_text(ADAPTER)
    paces = tuple({"pace": pace} for pace in ("middling", "fast", "slow"))
    known = SimpleNamespace(adapter="fake", install="pip install fake", settings=paces)
    monkeypatch.setitem(KNOWN, "fake", known)
    monkeypatch.setattr("engine.benchmark.peers.process.ROOT", str(tmp_path))
    return lambda **work: Peer("fake", None, work)


def reaches(pid: int, *states: str) -> bool:
    """Whether a process comes to be T (stopped), Z (ended), "" (gone) ... within seconds."""
    for _ in range(100):
        shown = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        if shown.stdout[:1] in states:
            return True
        time.sleep(0.1)
    return False


def test_a_peer_stands_still_between_its_turns(fake):
    with fake() as peer:
        assert peer.version == "1.2" and reaches(peer._process.pid, "T")
        ids, timings = peer.generate([[1, 2, 3], [4, 5, 6]], 2)
        assert ids == [[3, 3], [3, 3]] and reaches(peer._process.pid, "T")
        assert (timings.prompt_tokens, timings.prefill_ms, timings.step_tokens) == (6, 5.0, (2,))
    assert peer._process.returncode == 0


def test_what_a_peer_says_of_its_troubles(fake):
    with pytest.raises(PeerMissing, match="No module named 'absent'; pip install fake"):
        fake(module="absent")
    with fake() as peer:
        with pytest.raises(InputError, match="--compare fake: RuntimeError: nothing to predict"):
            peer.nll([1])
        assert peer.generate([[1]], 1)[0] == [[1]]
        with pytest.raises(InputError, match="its process ended: the last words"):
            peer.nll([1, 2])
    with pytest.raises(InputError, match="--peer-python fake=/nowhere/python: No such file"):
        Peer("fake", "/nowhere/python", {})


def test_the_fastest_setting_stays(fake):
    with fastest("fake", None, {}, [1, 2]) as peer:
        assert peer.setting == {"pace": "fast"}


KILLED = """
import sys, time
from types import SimpleNamespace

from engine.benchmark.peers import process

process.ROOT, process.KNOWN["fake"] = sys.argv[1], SimpleNamespace(adapter="fake", install="")
peer = process.Peer("fake", None, {})
print(peer._process.pid, flush=True)
DO
"""


@pytest.mark.parametrize("do", ["time.sleep(60)", "peer.nll([])"])
def test_no_process_outlives_a_killed_run(do, fake, tmp_path):
    """Neither a stopped one nor one at work."""
    command = [sys.executable, "-c", KILLED.replace("DO", do), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as run:
        pid = int(run.stdout.readline())
        assert reaches(pid, "T" if "sleep" in do else "S")
        run.kill()
    if not reaches(pid, "", "Z"):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the peer's process is still there")


def test_which_peers():
    assert chosen("ik, transformers", ["ik=/a/python"]) == {"ik": "/a/python", "transformers": None}
    with pytest.raises(InputError, match="not 'vllm'"):
        chosen("ik,vllm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "dir"}, "expected a .gguf file, found dir"),
        ({"kept": 2}, "runs every layer"),
        ({"batch": 2}, "expected --batch 1, not 2"),
    ],
)
def test_work_that_only_transformers_does(change, says):
    layers = [SimpleNamespace(layer=i) for i in range(change.get("kept", 3))]
    model = SimpleNamespace(
        path=Path(change.get("path", "m.gguf")),
        config=SimpleNamespace(layers=layers, total_layers=3),
        runtime=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, threads=1),
    )
    batch = change.get("batch", 1)
    with pytest.raises(InputError, match=says):
        work_of("ik", model, batch, 8)
    assert work_of("transformers", model, batch, 8)["layers"] == list(range(len(layers)))


def test_no_peer_is_given_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    config = SimpleNamespace(layers=[], total_layers=0)
    model = SimpleNamespace(path=tmp_path, config=config, runtime=None)
    with pytest.raises(InputError, match="--compare transformers: expected a whole model, found"):
        work_of("transformers", model, 1, 8)
