"""Damages files of every kind, reads each, and counts what comes of it.

    python -P tests/fuzz/harness.py --count 20000 --record benchmarks/results/fuzz.md

A worker process reads; where one dies, hangs or takes too much memory the case is recorded and
another goes on behind it. Every case follows from the seed and its number alone.
"""

import argparse
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[2]))  # behind a build that PYTHONPATH names

SECONDS = 20.0  # of one case
# A sanitizer's library is for what reads, not for the processes that templates run in, which have
# little memory.
PRELOAD = {key: os.environ.pop(key) for key in ("LD_PRELOAD",) if key in os.environ}
MEMORY_BYTES, PER_BYTE = 256 << 20, 4  # above the start, and for each byte of the file


def case(seed: int, number: int, sound: Path, place: Path) -> tuple[str, int]:
    """What became of one case: (outcome, bytes of the files read)."""
    from fuzz.mutate import mutated
    from fuzz.readers import READERS

    from engine.errors import InputError

    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(list(READERS))
    reader = READERS[kind]
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound / kind, place, symlinks=True)
    name = rng.choice(reader.damaged)
    damaged = mutated((place / name).read_bytes(), name, rng, kind == "template")
    (place / name).write_bytes(damaged)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    try:
        reader.read(place)
        return "read", size
    except InputError as error:
        long = len(str(error)) > 2500 or "\n" in str(error)
        return ("long refusal" if long else "refused"), size
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}", size


def peak_bytes() -> int:
    """Since the last `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def work(seed: int, first: int, stop: int, step: int, count_memory: int, sound: Path) -> None:
    """Cases first, first + step, ...: a line of JSON as each begins, and one as it ends."""
    import torch

    import engine.api  # noqa: F401 - what is imported is not to be counted

    say = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what libraries print
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    place = Path(tempfile.mkdtemp(dir=sound.parent)) / "case"
    case(seed, -1, sound, place)
    for number in range(first, stop, step):
        print(json.dumps({"begins": number}), file=say, flush=True)
        start, before = time.monotonic(), reset_peak()
        outcome, size = case(seed, number, sound, place)
        grown = peak_bytes() - before
        if count_memory and grown > PER_BYTE * size + MEMORY_BYTES:
            outcome = f"{grown >> 20} MB of memory"
        taken = time.monotonic() - start
        ends = {"ends": outcome, "seconds": taken, "grown": grown}
        print(json.dumps(ends), file=say, flush=True)


def write_sound(directory: Path) -> None:
    import torch
    from fuzz.readers import READERS

    rng = torch.Generator().manual_seed(0)
    for kind, reader in READERS.items():
        (directory / kind).mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            reader.write(directory / kind, rng)
        shutil.copytree(directory / kind, directory / "try" / kind)
        reader.read(directory / "try" / kind)  # sound ones are read
    shutil.rmtree(directory / "try")


class Worker:
    def __init__(
        self, seed: int, first: int, stop: int, step: int, count_memory: bool, sound: Path
    ) -> None:
        self.case, self.step = first, step
        numbers = [str(int(n)) for n in (seed, first, stop, step, count_memory)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", *numbers, str(sound)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | PRELOAD | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            bufsize=0,
        )
        self.lines, self.since = b"", time.monotonic() + 300  # imports


def fuzz(
    seed: int,
    count: int,
    workers: int,
    seconds: float | None = None,
    count_memory: bool = True,
) -> dict:
    """Runs the cases; {"outcomes", "failed", ...}, failed ones as (number, what)."""
    outcomes: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    longest, most, start = 0.0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        sound = Path(directory) / "sound"
        write_sound(sound)
        running = [Worker(seed, i, count, workers, count_memory, sound) for i in range(workers)]
        late = None if seconds is None else time.monotonic() + seconds
        while running:
            streams = [worker.process.stdout for worker in running]
            ready = select.select(streams, [], [], 0.5)[0]
            for worker in list(running):
                ended = None
                if worker.process.stdout in ready:
                    part = os.read(worker.process.stdout.fileno(), 1 << 16)
                    worker.lines += part
                    *lines, worker.lines = worker.lines.split(b"\n")
                    for said in map(json.loads, lines):
                        if "begins" in said:
                            worker.case, worker.since = said["begins"], time.monotonic()
                            continue
                        what = said["ends"]
                        outcomes[what] += 1
                        longest, most = max(longest, said["seconds"]), max(most, said["grown"])
                        if what not in ("read", "refused"):
                            failed.append((worker.case, what))
                    if not part:
                        code = worker.process.wait()
                        ended = None if code == 0 else f"signal {-code}" if code < 0 else "died"
                        running.remove(worker)
                elif time.monotonic() - worker.since > SECONDS:
                    worker.process.kill()
                    worker.process.wait()
                    ended = f"longer than {SECONDS:.0f} s"
                    running.remove(worker)
                if ended is not None:
                    outcomes[ended] += 1
                    failed.append((worker.case, ended))
                    following = worker.case + worker.step
                    if following < count:
                        options = (worker.step, count_memory, sound)
                        running.append(Worker(seed, following, count, *options))
            if late is not None and time.monotonic() > late:
                for worker in running:
                    worker.process.kill()
                    worker.process.wait()
                break
    return {
        "seed": seed,
        "cases": sum(outcomes.values()),
        "outcomes": dict(outcomes.most_common()),
        "failed": failed,
        "longest_s": round(longest, 2),
        "most_memory_mb": most >> 20,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, help="ends after them, whatever the count")
    parser.add_argument("--only", type=int, help="this case alone, here, with its traceback")
    parser.add_argument("--record", type=Path, help="appends the result to this file")
    parser.add_argument("--no-memory", action="store_true", help="of a sanitizer's build")
    asked = parser.parse_args()
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as directory:
            write_sound(Path(directory) / "sound")
            print(case(asked.seed, asked.only, Path(directory) / "sound", Path(directory) / "case"))
        return
    seconds = None if asked.minutes is None else 60 * asked.minutes
    found = fuzz(asked.seed, asked.count, asked.workers, seconds, not asked.no_memory)
    print(json.dumps(found, indent=1))
    if asked.record is not None:
        with open(asked.record, "a") as file:
            file.write(json.dumps(found) + "\n")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*map(int, sys.argv[2:7]), Path(sys.argv[7]))
    else:
        main()
