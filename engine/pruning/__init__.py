"""From text to the layers that go: profile, plan, score, budget.

In: a checkpoint and samples. Out: a `Profile` of distances, a `Plan` of kept layers, a `Budget`.
"""
