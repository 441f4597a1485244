"""How good a model is: it predicts texts, chooses answers, and generates.

In: a runtime, its tokenizer, and a text, questions or nothing. Out: frozen records, which a
`Judgement` (engine/judgement.py) holds together. With a second model, also what is left of it.
"""

from engine.evaluate.choices import judge_choices
from engine.evaluate.health import judge_health
from engine.evaluate.judge import Asked, judge
from engine.evaluate.perplexity import cut_windows, evaluate

__all__ = ["Asked", "cut_windows", "evaluate", "judge", "judge_choices", "judge_health"]
