"""What a model was judged by, under names for people; one record, or several side by side."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.artifacts import Evaluation
from engine.judgement import Choices, Comparison, Health, Judgement, Paired


def measures(
    record: Judgement, first: Judgement | None = None, paired: Paired | None = None
) -> dict[str, str]:
    """name -> value. Of `first`, where given, perplexities of the same windows are multiples, and
    `paired` is with it, else with the model that the record was judged against."""
    rows = {
        "model": record.model,
        "layers": f"{record.layers_kept} of {record.layers_total}: {record.layers}",
        "rule": record.rule or "-",
    }
    if record.against is not None:
        rows["whole model"] = record.against
    others = {} if first is None else {each.text_hash: each for each in first.texts.values()}
    for name, text in zip(_short(record.texts), record.texts.values(), strict=True):
        cells = _text(text, others.get(text.text_hash))
        rows |= {f"{name}: {key}": cell for key, cell in cells}
    if len(record.texts) > 1:
        rows["perplexity, geometric mean"] = f"{record.perplexity:,.4f}"
    if record.choices:
        rows |= _choices(record.choices, paired or record.choices.against)
    if record.health:
        rows |= _health(record.health)
    return rows


def side_by_side(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    """(name, a value a record, "-" where it has none), in the order in which names come up."""
    first = found.records[0]
    columns = [measures(first)]
    for record, paired in zip(found.records[1:], found.paired[1:], strict=True):
        columns.append(measures(record, first, paired))
    for name in dict.fromkeys(name for column in columns for name in column):
        yield name, [column.get(name, "-") for column in columns]


def _short(names: Iterable[str]) -> list[str]:
    """Without their folders, where that still tells one from the other."""
    long = list(names)
    short = [Path(name).name for name in long]
    return short if len(set(short)) == len(long) else long


def _text(text: Evaluation, whole: Evaluation | None) -> Iterator[tuple[str, str]]:
    times = "" if whole is None else f" ({text.perplexity / whole.perplexity:.3f}x)"
    yield "perplexity", f"{text.perplexity:,.4f}{times}"
    if text.bits_per_byte is not None:
        yield "bits a byte", f"{text.bits_per_byte:.4f}"
    if text.kl is not None:
        yield "KL from the whole model", f"{text.kl:.5f}"
    if text.top1_agreement is not None:
        yield "same likeliest token", f"{text.top1_agreement:.2%}"
    yield "read in", f"{text.windows} windows of {text.window}, {_bos(text.bos)}"


def _choices(found: Choices, paired: Paired | None) -> dict[str, str]:
    rows = {
        "questions": f"{found.questions}, {_bos(found.bos)}",
        "accuracy": f"{found.accuracy:.1%} {_interval(found.accuracy_low, found.accuracy_high)}",
        "probability of the right choice": f"{found.probability:.4f}, by chance {found.chance:.4f}",
    }
    if paired:
        interval = _interval(paired.difference_low, paired.difference_high)
        rows["accuracy, less the whole model's"] = f"{paired.accuracy_difference:+.1%} {interval}"
        share = "-" if paired.lead_share is None else f"{paired.lead_share:.1%}"
        rows["share of its lead over chance"] = share
    return rows


def _health(found: Health) -> dict[str, str]:
    rows = {
        "generations": f"{found.prompts} of up to {found.new_tokens} tokens, {_bos(found.bos)}",
        "loop": f"{found.looping:.1%}",
        "end by themselves": f"{found.ended:.1%}, {found.mean_tokens:.1f} tokens in the mean",
    }
    for n, share in enumerate(found.distinct, 1):
        rows[f"distinct-{n}"] = f"{share:.4f}"
    if found.agreement is not None:
        rows["greedy text as the whole model's"] = f"{found.agreement:.1%}"
    return rows


def _interval(low: float, high: float) -> str:
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _bos(bos: bool) -> str:
    return "with BOS" if bos else "without BOS"
