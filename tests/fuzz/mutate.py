"""Damage: bytes where a file's structure lies, and values of JSON wherever it is one."""

import json
import random
from copy import deepcopy
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    31,
    33,
    127,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63,
    2**64 - 1,
)
ODD = (
    None, True, False, "", "x", "\ud800", "a" * 400, [], {}, [[]], [None], {"a": {}}, -1, 0, 1, 2,
    2**31, 2**63, 2**70, 1.5, -0.0, 1e-45, 1e30, 1e308, float("nan"), float("inf"), -float("inf"),
    "F64", "F8_E4M3", "I32", "BOOL", "yarn", "longrope", "dynamic", "../x", "/dev/zero",
)  # fmt: skip
PROGRAMS = (
    "{{ '%1000000000s' % 'a' }}", "{{ messages[0].__class__ }}", "{{ [0] * 99999999 }}",
    "{% for i in range(9999) %}{{ messages }}{% endfor %}", "{{ 9 ** 99999 }}", "{{ x.y.z }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{", "{% if %}", "{{ ''|center(10**9) }}",
    "{{ messages | tojson | urlize }}", "\ud800", "{{ raise_exception(messages) }}",
)  # fmt: skip


def mutated(data: bytes, name: str, rng: random.Random, template: bool = False) -> bytes:
    """`data`, damaged in one to three places."""
    if template:
        raw = json.loads(data)
        raw["chat_template"] = _program(raw["chat_template"], rng)
        return json.dumps(raw).encode()
    if name.endswith(".json") and rng.random() < 0.8:
        return _json(data, rng)
    if name.endswith(".safetensors") and rng.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = _json(data[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return _bytes(data, rng)


def _json(data: bytes, rng: random.Random) -> bytes:
    root = [json.loads(data)]
    for _ in range(rng.randint(1, 3)):
        place: Any = root
        while True:
            keys = list(range(len(place)) if isinstance(place, list) else place)
            key = rng.choice(keys)
            deeper = isinstance(place[key], dict | list) and place[key]
            if not deeper or (place is not root and rng.random() < 0.15):
                break
            place = place[key]
        _edit(place, key, rng)
        if not root or not isinstance(root[0], dict | list) or not root[0]:
            break
    return json.dumps(root[0] if root else None).encode()


def _edit(place: Any, key: Any, rng: random.Random) -> None:
    value, kind = place[key], rng.random()
    if kind < 0.15:
        del place[key]
    elif kind < 0.3 and isinstance(place, dict):
        place[rng.choice([*place, "x", "quantization_config", "rope_scaling"])] = deepcopy(value)
    elif kind < 0.55 and type(value) in (int, float) and value == value and abs(value) < 1e300:
        place[key] = rng.choice((value + 1, value - 1, value * 2, -value, value // 2, value + 0.5))
    elif kind < 0.65 and isinstance(value, list):
        place[key] = rng.choice((value[:-1], value + value[:1], value[::-1], [value]))
    else:
        place[key] = deepcopy(rng.choice(ODD))  # another edit may go into it


def _bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        reach = len(data) if rng.random() < 0.3 else min(len(data), 1500)
        at, size = rng.randrange(max(reach, 1)), rng.choice((1, 2, 4, 8))
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            data = data[:at] + number + data[at + size :]
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[: at + size] + data[at:]
        elif kind == 4:
            data = data[:at] + rng.randbytes(size) + data[at:]
        elif rng.random() < 0.3:
            data = data[:at]
    return data


def _program(template: str, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(PROGRAMS)
    at, end = sorted(rng.sample(range(len(template)), 2))
    part = rng.choice((rng.choice(PROGRAMS), template[at:end], "", "{{ messages }}", "%}"))
    return template[:at] + part + template[rng.choice((at, end)) :]
