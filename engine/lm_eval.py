"""The adapter to lm-evaluation-harness: its tasks, our runtimes.

    lm_eval --model shallow --model_args pretrained=DIR,drop=14-18 --tasks NAME

with lm-eval newer than 0.4.13; older ones need `python -m engine.lm_eval` in the place of
`lm_eval`. From Python, `lm_eval.simple_evaluate(model=ShallowLM(pretrained=DIR))`.
Requests are tokenized, cut and scored as by lm-eval's own `hf` model.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from engine.commands import interrupt

    interrupt.watch()


import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from engine.api import load
from engine.artifacts import Plan
from engine.checkpoint.fetch import DEFAULT
from engine.errors import InputError
from engine.evaluate.choices import Encoded, log_likelihoods
from engine.generation import generate
from engine.options import Options
from engine.progress import progress
from engine.runtime import at_once

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:
    absent = "lm-eval is not installed: pip install 'lm-eval>=0.4.10'"
    if __name__ == "__main__":
        print(f"engine.lm_eval: {absent}", file=sys.stderr)
        sys.exit(2)
    raise InputError(absent) from None

Tokens = list[int]
logger = logging.getLogger("engine.lm_eval")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # said by some tasks


@register_model("shallow")
class ShallowLM(TemplateLM):
    """A model that `engine.load` opens, with these of its options; those of lm-eval by its names.

    `drop`, `keep`: layers as "14-18"; `plan`: a plan.json; `max_length`: tokens of context.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT.name,
        *,
        drop: Any = None,
        keep: Any = None,
        plan: str | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        cache_dtype: str | None = None,
        isa: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,  # lm-eval hands it to every model
        trust_remote_code: bool = False,  # and this, asked for its data sets
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"model_args: {next(iter(unknown))!r} is not known")
        if plan is not None and (drop is not None or keep is not None):
            raise InputError("plan excludes drop and keep")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size: expected a number of at least 1, found {batch_size}")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
            raise InputError(f"max_length: expected at least 2 tokens, found {max_length!r}")
        if type(max_gen_toks) is not int or max_gen_toks < 1:
            raise InputError(f"max_gen_toks: expected at least 1 token, found {max_gen_toks!r}")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning("no GPU here: %s, lm-eval's default, becomes cpu", device)
            device = "cpu"
        self.opened = load(
            pretrained,
            drop=_layers(drop) if plan is None else Plan.load(Path(plan)),
            keep=_layers(keep),
            backend=backend,
            dtype=dtype,
            device=device,
            threads=threads,
            cache_dtype=cache_dtype,
            isa=isa,
        )
        self.name, self.batch_size, self.max_gen_toks = pretrained, int(batch_size), max_gen_toks
        self.max_length = longest = self.opened.config.max_context
        if max_length is not None and max_length > longest:
            logger.warning("max_length: %d becomes %d, the model's context", max_length, longest)
        elif max_length is not None:
            self.max_length = max_length
        self.add_bos_token = add_bos_token

    @property
    def eot_token_id(self) -> int:
        text = self.opened.text
        named = text.tokenizer.token_to_id(text.special.get("eos_token", ""))
        ends = (named,) if named is not None else text.eos_ids or self.opened.config.eos_ids
        if not ends:
            raise InputError(f"{self.name}: the model has no token that ends a text")
        return min(ends)

    @property
    def prefix_token_id(self) -> int:
        bos = self.opened.text.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None  # the model's own, which `apply_chat_template` takes

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not add_generation_prompt:
            raise InputError("apply_chat_template: add_generation_prompt=False is not supported")
        return self.opened.text.render(chat_history)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Tokens:
        """Begins with BOS as the tokenizer does, or as `add_bos_token` says; never twice."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        text = self.opened.text
        ids = text.encode(string, add_special=False)
        if special is False or (add_special_tokens is None and ids[:1] == [self.prefix_token_id]):
            return ids
        return (
            text.encode(string) if special is None or text.bos_id is None else [text.bos_id, *ids]
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Tokens, Tokens]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Neighbours with one context, the choices of a question, run it once."""
        blank = [self.prefix_token_id]  # lm-eval gives a space before the continuation to that
        cut = [_cut(context or blank, tail, self.max_length) for _, context, tail in requests]
        order = sorted(range(len(cut)), key=lambda i: (-len(cut[i][0]), cut[i][0]))
        groups = [list(group) for _, group in groupby(order, key=lambda i: cut[i][0])]
        encoded = [Encoded(cut[group[0]][0], [cut[i][1] for i in group]) for group in groups]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(cut)
        likelihoods = log_likelihoods(self.opened.runtime, encoded, self.batch_size)
        with progress("contexts") as report:
            for done, (group, each) in enumerate(zip(groups, likelihoods, strict=True), 1):
                for i, total, greedy in zip(group, each.sums.tolist(), each.greedy, strict=True):
                    found[i] = total, greedy
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                report(done, len(groups))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        totals = []
        for (string,) in [request.args for request in requests]:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(total for total, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        opened, done = self.opened, 0
        with progress("generations") as report:
            for batch in self._batches([request.args[1] for request in requests]):
                options = self._options(requests[batch[0]].args[1])
                room = self.max_length - options.max_new_tokens
                if room < 1:
                    raise InputError(
                        f"max_gen_toks: {options.max_new_tokens} leave no room in a context of "
                        f"{self.max_length}"
                    )
                contexts = [self.tok_encode(requests[i].args[0])[-room:] for i in batch]
                made = generate(opened.runtime, opened.text, contexts, options)
                for i, each in zip(batch, made, strict=True):
                    found[i] = each.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, each.text)
                done += len(batch)
                report(done, len(requests))
        return found

    def _batches(self, asked: list[dict[str, Any]]) -> Iterator[list[int]]:
        """Places of requests that can run together."""
        said = [repr(each) for each in asked]
        # One alone where rotations depend on the longest of a batch.
        alone = self.opened.config.whole_prefill
        size = 1 if alone else at_once(self.batch_size, self.opened.runtime)
        for _, group in groupby(sorted(range(len(said)), key=said.__getitem__), said.__getitem__):
            places = list(group)
            for start in range(0, len(places), size):
                yield places[start : start + size]

    def _options(self, asked: dict[str, Any]) -> Options:
        given = {name: value for name, value in asked.items() if NEUTRAL.get(name) != value}
        try:
            given = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        except (TypeError, ValueError):
            raise InputError(
                "gen_kwargs: expected numbers for temperature and max_gen_toks, found "
                f"{asked!r:.200}"
            ) from None
        length, until = given.pop("max_gen_toks"), given.pop("until")
        if unknown := sorted(given.keys() - {"do_sample", "repetition_penalty", *SAMPLING}):
            raise InputError(f"gen_kwargs: {unknown[0]!r} is not known")
        options: dict[str, Any] = {"repetition_penalty": given.get("repetition_penalty", 1.0)}
        if given.pop("do_sample", False):  # from torch's numbers, which lm-eval's --seed begins
            options |= {"temperature": 1.0, "seed": int(torch.randint(1 << 31, ()))}
            options |= {name: given[name] for name in SAMPLING if name in given}
        stop = tuple(stop for stop in until if stop)
        return Options(max_new_tokens=length, stop=stop, **options)


def _layers(given: Any) -> Any:
    """lm-eval makes a number of `drop=5`, and its JSON may hold a list."""
    return str(given) if isinstance(given, int) else given


def _cut(context: Tokens, tail: Tokens, longest: int) -> tuple[Tokens, Tokens]:
    """The last tokens that fit; what predicts the last of them is all that is run."""
    if not 0 < len(tail) <= longest:
        raise InputError(f"a continuation: expected 1 to {longest} tokens, found {len(tail)}")
    whole = (context + tail)[-(longest + 1) :]
    return whole[: -len(tail)], tail


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from engine.commands import output

    output.execute(lambda standalone_mode: cli_evaluate())
