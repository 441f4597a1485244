"""What a model was judged by, as values that go to and from JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from engine.artifacts import Artifact, Evaluation
from engine.errors import InputError

BUILT_IN = "the built-in text"  # its name among texts
LARGEST_EXPONENT = 700.0  # math.exp raises a little beyond
Z = 1.959964  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Paired:
    """A model beside the whole one on the same questions."""

    whole_accuracy: float
    whole_probability: float
    accuracy_difference: float  # this model's - the whole one's
    difference_low: float  # 95 % interval of it, question by question
    difference_high: float
    lead_share: float | None  # of the whole one's probability over chance; None where it has none


@dataclass(frozen=True)
class Choices:
    """Multiple choice: the choice of the largest log-likelihood a character is taken.

    So its accuracy is what lm-eval calls acc_norm. A choice's probability is the softmax of these
    over the choices of its question.
    """

    source: str  # file
    questions: int
    questions_hash: str  # of their texts, so that models of any tokenizer compare
    bos: bool  # did every question begin with BOS
    accuracy: float
    accuracy_low: float  # 95 % interval (Wilson)
    accuracy_high: float
    probability: float  # of the right choice, mean over questions
    chance: float  # the same of a model that knows nothing
    correct: tuple[bool, ...]  # a question each
    probabilities: tuple[float, ...]  # of the right choice, a question each
    against: Paired | None = None

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ValueError(f"questions: expected at least 1, found {self.questions}")
        for name in ("correct", "probabilities"):
            if (found := len(getattr(self, name))) != self.questions:
                raise ValueError(
                    f"{name}: expected {self.questions}, a question each, found {found}"
                )

    @classmethod
    def of(
        cls, source: str, questions_hash: str, bos: bool, chance: float, correct: tuple[bool, ...],
        probabilities: tuple[float, ...],
    ) -> Self:  # fmt: skip
        """With the means and the interval of what each question gave."""
        count = len(correct)
        low, high = wilson(sum(correct), count)
        return cls(
            source=source,
            questions=count,
            questions_hash=questions_hash,
            bos=bos,
            accuracy=sum(correct) / count,
            accuracy_low=low,
            accuracy_high=high,
            probability=math.fsum(probabilities) / count,
            chance=chance,
            correct=correct,
            probabilities=probabilities,
        )

    def beside(self, whole: "Choices") -> Paired:
        """Compared with the whole model's answers; InputError unless to the same questions."""
        asked = [(each.questions_hash, each.questions) for each in (self, whole)]
        if asked[0] != asked[1]:
            raise InputError(f"{self.source} and {whole.source}: not the same questions")
        changes = [a - b for a, b in zip(self.correct, whole.correct, strict=True)]
        mean = sum(changes) / len(changes)
        variance = sum((change - mean) ** 2 for change in changes) / max(1, len(changes) - 1)
        margin = Z * math.sqrt(variance / len(changes))
        lead = whole.probability - whole.chance
        return Paired(
            whole_accuracy=whole.accuracy,
            whole_probability=whole.probability,
            accuracy_difference=mean,
            difference_low=mean - margin,
            difference_high=mean + margin,
            lead_share=(self.probability - self.chance) / lead if lead > 0 else None,
        )


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share; within 0..1 however extreme it is."""
    share, z2 = right / count, Z * Z / count
    middle, margin = share + z2 / 2, Z * math.sqrt((share * (1 - share) + z2 / 4) / count)
    return max(0.0, (middle - margin) / (1 + z2)), min(1.0, (middle + margin) / (1 + z2))


WINDOW = 512  # tokens of text at once
PROMPTS = 200
NEW_TOKENS = 256  # of each
LAST, LONGEST = 64, 32  # a loop: so many last tokens have a period of at most so many


@dataclass(frozen=True)
class Health:
    """Greedy text from fixed prompts. Shares are of generations."""

    prompts: int
    prompts_hash: str  # of their token ids
    new_tokens: int  # at most, of a generation
    bos: bool  # did every prompt begin with BOS
    mean_tokens: float  # of a generation
    looping: float  # share whose LAST last tokens repeat with a period of at most LONGEST
    ended: float  # share that a stop token ended
    distinct: tuple[float, ...]  # [n - 1]: different n-grams over all, each generation's own
    agreement: float | None = None  # with the whole model: see `engine.evaluate.health`


@dataclass(frozen=True)
class Judgement(Artifact):
    """All that one model was judged by in one go."""

    kind: ClassVar[str] = "judgement"

    model: str  # as it was asked for
    layers: str  # run, as the checkpoint numbers them
    layers_kept: int
    layers_total: int
    rule: str | None  # that chose the layers
    against: str | None  # the whole model, as it was asked for
    perplexity: float  # geometric mean over the texts
    texts: dict[str, Evaluation]  # by name
    choices: Choices | None = None
    health: Health | None = None

    def __post_init__(self) -> None:
        if not self.perplexity > 0:
            raise ValueError(f"perplexity: expected more than 0, found {self.perplexity}")

    @classmethod
    def of(
        cls,
        texts: dict[str, Evaluation],
        against: str | None = None,
        choices: Choices | None = None,
        health: Health | None = None,
    ) -> Self:
        """Of one or more texts that one model predicted, the geometric mean taken."""
        found = list(texts.values())
        first = found[0]
        return cls(
            model=first.model,
            layers=first.layers,
            layers_kept=first.layers_kept,
            layers_total=first.layers_total,
            rule=first.rule,
            against=against,
            perplexity=geometric_mean([each.nll for each in found]),
            texts=texts,
            choices=choices,
            health=health,
        )


@dataclass(frozen=True)
class Comparison(Artifact):
    """Judgements side by side."""

    kind: ClassVar[str] = "comparison"

    records: tuple[Judgement, ...]
    paired: tuple[Paired | None, ...]  # each with the first on the same questions

    @classmethod
    def of(cls, records: tuple[Judgement, ...]) -> Self:
        """None is paired where it or the first has no choices. InputError for other questions."""
        whole, *others = (record.choices for record in records)
        paired = [None if not whole or not each else each.beside(whole) for each in others]
        return cls(records, (None, *paired))


def geometric_mean(nlls: Sequence[float]) -> float:
    """Of perplexities, by their negative log-likelihoods in nats; infinite beyond a float."""
    mean = math.fsum(nll / len(nlls) for nll in nlls)  # whose sum a float may not hold
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf
