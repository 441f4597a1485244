"""The speed of a run and what it depends on: its steps by part, the machine, other engines.

In: a loaded model, a prompt, peers. Out: a `RunRecord`.
"""
