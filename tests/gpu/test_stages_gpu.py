"""`engine profile` and `engine plan --rule greedy` as they run on a GPU."""

from support.interpreted import run_interpreted


def test_interpreted():
    run_interpreted("stages")
