"""Writing commands that are killed, interrupted or run out of disk, again and again.

    python -P tests/fuzz/endings.py kills --count 200
    python -P tests/fuzz/endings.py interrupts --count 100
    python -P tests/fuzz/endings.py disks --count 20        # root: each on a file system of its own

A command runs in a fork of this process, which has imported everything: the moments are those of
its work. tests/commands/test_interrupt.py interrupts whole programs, from their first line on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: as the commands do

import torch
from safetensors import safe_open

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[2]))  # behind a build that PYTHONPATH names

TEXT = "text.txt"
COMMANDS = {
    "prune": ["prune", "model", "out", "--drop", "1"],
    "quantize rtn": ["quantize", "model", "out", "--method", "rtn", "--group", "16"],
    "quantize gptq": [
        *("quantize", "model", "out", "--method", "gptq", "--group", "16"),
        *("--text", TEXT, "--samples", "4", "--length", "16"),
    ],
    "profile": ["profile", "model", "--out", "out", "--text", TEXT, "--length", "16"],
    "profile --stream": [
        *("profile", "model", "--out", "out", "--text", TEXT, "--length", "16", "--stream"),
    ],
    "plan": ["plan", "profile.json", "--out", "out", "--count", "1", "--protect", "none"],
    "export hf": ["export", "packed", "out", "--to", "hf"],
    "export gptq": ["export", "packed", "out", "--to", "gptq"],
    "export compressed-tensors": ["export", "packed", "out", "--to", "compressed-tensors"],
    "prune packed": ["prune", "packed", "out", "--drop", "1"],
}
LEARNS = {  # its record says how long it took: tests/commands/test_killed.py compares the tensors
    f"heal {method}": [
        *("heal", "model", "out", "--drop", "1", "--method", method, "--text", TEXT),
        *("--window", "16", "--batch-tokens", "32", "--steps", "3"),
    ]
    for method in ("linear", "distil")
}
FILES = ("profile", "profile --stream", "plan")  # whose output is a file, which may be there


def forked(arguments: list[str], place: Path, watched: bool = False) -> int:
    """`engine ...` in `place` in a child; its process id. What it says goes to place/said."""
    if child := os.fork():
        return child
    os.chdir(place)
    for number in (1, 2):
        os.dup2(os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from engine.cli import app
    from engine.commands import interrupt, output

    if watched:
        interrupt.watch()
    with contextlib.suppress(BaseException):
        try:
            output.execute(lambda standalone_mode: app(arguments, standalone_mode=False))
        except SystemExit as left:
            os._exit(left.code if isinstance(left.code, int) else 0)
        except BaseException:
            import traceback

            traceback.print_exc()
    os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(place: Path, sound: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    place.with_name("said").unlink(missing_ok=True)


def said(place: Path) -> str:
    file = place.with_name("said")
    return file.read_text(errors="replace") if file.exists() else ""


def digest(out: Path) -> str:
    """Of a directory's files or of a file, timestamps aside.

    A safetensors file counts by what it holds: the order of its metadata changes.
    """
    files = sorted(out.rglob("*")) if out.is_dir() else [out]
    whole = hashlib.sha256()
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                whole.update(json.dumps(opened.metadata(), sort_keys=True).encode())
                for name in sorted(opened.keys()):
                    tensor = opened.get_tensor(name)
                    whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif file.is_file():
            whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def wrong_words(text: str) -> bool:
    return "Traceback" in text or "Exception" in text


def kills(rng: random.Random, count: int, base: Path, sound: Path) -> list[str]:
    place, trouble = base / "place", []
    expected, seconds = {}, {}
    for name, arguments in COMMANDS.items():
        fresh(place, sound)
        start = time.monotonic()
        assert ended(forked(arguments, place)) == 0, said(place)
        expected[name], seconds[name] = digest(place / "out"), time.monotonic() - start
        assert {file.name for file in place.iterdir()} == {*os.listdir(sound), "out"}
    for number in range(count):
        name = rng.choice(list(COMMANDS))
        fresh(place, sound)
        for _ in range(rng.randint(1, 2)):
            child = forked(COMMANDS[name], place)
            time.sleep(rng.random() * seconds[name])
            os.kill(child, signal.SIGKILL)
            if ended(child) == 0:
                break
        stands = (place / "out").exists() and name not in FILES  # the next run refuses it
        if ended(forked(COMMANDS[name], place)) != (2 if stands else 0):
            trouble.append(f"{number}: {name}: {said(place)[-200:]}")
        elif digest(place / "out") != expected[name]:
            trouble.append(f"{number}: {name}: another result")
        elif left := {file.name for file in place.iterdir()} - {*os.listdir(sound), "out"}:
            trouble.append(f"{number}: {name}: leaves {left}")
    return trouble


def interrupts(rng: random.Random, count: int, base: Path, sound: Path) -> list[str]:
    place, trouble = base / "place", []
    commands = (
        COMMANDS
        | LEARNS
        | {"run": ["run", "--model", "model", "--prompt", "3 1", "--raw", "--new-tokens", "60"]}
    )
    number = 0
    while number < count:
        name = rng.choice(list(commands))
        fresh(place, sound)
        child = forked(commands[name], place, watched=True)
        time.sleep(rng.random() * 0.6)
        os.kill(child, signal.SIGINT)
        code = ended(child)
        if code == 0:
            continue  # it had ended before
        number += 1
        if code not in (130, -signal.SIGINT) or wrong_words(said(place)):
            trouble.append(f"{number}: {name}: exit {code}: {said(place)[-300:]}")
    return trouble


def disks(rng: random.Random, count: int, base: Path, sound: Path) -> list[str]:
    place, trouble = base / "disk", []
    held = sum(pages(file) for file in sound.rglob("*"))
    place.mkdir()
    for name, arguments in (COMMANDS | LEARNS).items():
        full, most = 0, 28  # pages that are free; a run that found them enough lowers this
        least = int(name in FILES)  # "earlier"
        while full < count and most > least:
            free = rng.randrange(least, most)
            size = f"size={(held + free) * 4096}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
            try:
                shutil.copytree(sound, place, dirs_exist_ok=True)
                if name in FILES:
                    (place / "out").write_text("earlier")
                (base / "said").unlink(missing_ok=True)
                code = ended(forked(arguments, place))
                if code == 0:
                    most = free
                    continue
                full += 1
                text = said(place)
                refused = code == 2 and len(re.findall("^engine: ", text, re.M)) == 1
                if not refused or wrong_words(text):
                    trouble.append(f"{name}, {free} pages free: exit {code}: {text[-300:]}")
                out = place / "out"
                if out.read_text() != "earlier" if name in FILES else out.exists():
                    trouble.append(f"{name}, {free} pages free: the earlier output has changed")
            finally:
                subprocess.run(["umount", str(place)], check=True)
        print(f"{name}: {full} times the disk was full")
    return trouble


def pages(file: Path) -> int:
    """Of a tmpfs, whose directories take none."""
    return -(-file.stat().st_size // 4096) if file.is_file() else 0


def write_sound(sound: Path) -> None:
    from fuzz.readers import artefacts, model

    from engine.checkpoint import open_checkpoint
    from engine.quantize.packing import pack
    from engine.quantize.recipe import Recipe

    sound.mkdir()
    (sound / "model").mkdir()
    model("llama", torch.Generator().manual_seed(0), sound / "model")
    checkpoint = open_checkpoint(sound / "model")
    recipe = Recipe("rtn", group=16, head=16)
    pack(checkpoint, checkpoint.config, sound / "packed", recipe)
    (sound / TEXT).write_text(" ".join(str(n * 7 % 29 + 3) for n in range(200)))
    with tempfile.TemporaryDirectory() as place:
        artefacts(Path(place), torch.Generator().manual_seed(0))
        shutil.copy(Path(place) / "profile.json", sound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "interrupts", "disks"))
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for module in ("cli", "export.hf", "quantize.packing", "pruning.plan", "healing.heal", "api"):
        __import__(f"engine.{module}")
    with tempfile.TemporaryDirectory() as base:
        write_sound(Path(base) / "sound")
        rng, start = random.Random(asked.seed), time.monotonic()
        run = {"kills": kills, "interrupts": interrupts, "disks": disks}[asked.what]
        trouble = run(rng, asked.count, Path(base), Path(base) / "sound")
    print("\n".join(trouble))
    minutes = (time.monotonic() - start) / 60
    print(f"{asked.what}: seed {asked.seed}, {len(trouble)} troubles, {minutes:.1f} minutes")
    sys.exit(bool(trouble))


if __name__ == "__main__":
    main()
