"""transformers' Trainer as qlora drives it: its loop, devices and processes; our order of the text,
our rate, and checkpoints that a killed run goes on from to the same bits.

Randomness is drawn from the seed and the step alone (and the process, for its dropout), so that a
checkpoint holds weights, moments and the standing, and no state of a generator.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from engine.errors import InputError
from engine.healing import state
from engine.healing.data import Data, perplexity
from engine.healing.distil import LOGITS, extent, rate, share, why_stop
from engine.healing.randomness import seed_of
from engine.healing.settings import Settings
from engine.progress import Report

UNENDING = 1 << 30  # steps of a run that the clock ends


def teach(
    model: Any,
    data: Data,
    settings: Settings,
    directory: Path,
    device: torch.device | str,
    report: Report | None,
) -> state.Standing:
    """Trains what learns in `model` and leaves it with the weights of its best check."""
    learner = Learner(model, data, settings, directory, device, report)
    learner.run()
    return learner.standing


class _NotFinite(Exception):
    """The step that has just been computed is none."""


class Windows(Dataset):
    """What steps from `first` on learn from, in their order: windows (W,) int64 and labels."""

    def __init__(self, data: Data, settings: Settings, batch: int, first: int) -> None:
        self.data, self.seed, self.start = data, settings.seed, first * batch
        self.count = ((settings.steps or UNENDING) - first) * batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        window = self.data.windows[self.data.drawn(self.start + place, self.seed)]
        return {"input_ids": window, "labels": window}


class Learner(Trainer):
    """One training, from its last checkpoint on."""

    def __init__(
        self,
        model: Any,
        data: Data,
        settings: Settings,
        directory: Path,
        device: torch.device | str,
        report: Report | None,
    ) -> None:
        self.pupil, self.data, self.settings, self.report = model, data, settings, report
        self.file, self.best = directory / "qlora.safetensors", directory / "qlora.best.safetensors"
        named = model.named_parameters()
        self.learning = {name: weight for name, weight in named if weight.requires_grad}
        self.standing = state.standing(self.file)
        arguments = _arguments(settings, directory, device, data.windows.shape[1], model)
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        batch *= arguments.world_size
        left = (settings.steps or UNENDING) - self.standing.step
        arguments.max_steps = max(1, left)
        self.windows = Windows(data, settings, batch, self.standing.step)
        super().__init__(model, arguments, train_dataset=self.windows, callbacks=[Watch(self)])
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            raise InputError(
                "FSDP: the 4-bit matrices are buffers, which it does not shard, so it would save "
                "no memory; begin it in data parallel, as accelerate launch --multi_gpu does"
            )
        self.model_accepts_loss_kwargs = False  # the mean over windows of one length is the loss
        self.losses: list[torch.Tensor] = []  # of the windows of a step

    def run(self) -> None:
        """Returns with the best weights in the model."""
        self.begun, self.earlier = time.monotonic(), self.standing.seconds
        self.first = self.standing.step
        if self.standing.step:
            state.restore(self.file, self.learning)
        if not self.standing.checks:
            self.check()
        if not self.standing.stopped:
            try:
                self.train()
            except _NotFinite:
                self.standing.stopped = f"the loss is not finite at step {self.standing.step + 1}"
        self.accelerator.wait_for_everyone()
        weights = state.load_weights(self.best, self.learning)
        with torch.no_grad():
            for name, weight in self.learning.items():
                weight.copy_(weights[name])

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.windows)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """By where the training stands, which a run that was taken up again is in the midst of."""
        optimizer = self.optimizer if optimizer is None else optimizer

        def factor(_: int) -> float:
            return rate(share(self.standing, self.settings), self.settings) / self.settings.lr

        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs, use_cache=False).loss
        self.losses.append(loss.detach())
        return loss

    def draw(self) -> None:
        """Seeds the step that comes."""
        step = seed_of(self.settings.seed, self.standing.step)
        torch.manual_seed(step * 1009 + self.args.process_index)

    def judge(self) -> None:
        """The step's loss, over all processes; raises, in all of them, where it is no number."""
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        self.loss = float(self.accelerator.gather(loss[None]).float().mean())
        norms = [w.grad.norm() for w in self.learning.values() if w.grad is not None]
        if not math.isfinite(self.loss) or not bool(torch.stack(norms).isfinite().all()):
            raise _NotFinite

    def count(self) -> None:
        """A step is done."""
        self.standing.step += 1
        self.standing.losses.append(self.loss)
        self.standing.seconds = self.earlier + time.monotonic() - self.begun

    def end_step(self) -> bool:
        """Checks, saves and reports; whether it was the last one."""
        standing, settings = self.standing, self.settings
        standing.stopped = self._agreed(why_stop(standing, settings))
        if standing.stopped or standing.step % settings.check_every == 0:
            self.check()
        if self.report is not None:
            tokens = len(self.data.windows[0]) * settings.batch * (standing.step - self.first)
            speed = tokens / max(1e-9, standing.seconds - self.earlier)
            said = f"loss {standing.losses[-1]:.4f}, {speed:.0f} tokens/s"
            self.report(*extent(standing, settings), said)
        return bool(standing.stopped)

    def _agreed(self, stopped: str) -> str:
        """What the first process says: each has a clock of its own."""
        if self.args.world_size == 1 or self.settings.minutes is None:
            return stopped
        from accelerate.utils import broadcast_object_list

        found: str = broadcast_object_list([stopped])[0]
        return found

    def check(self) -> None:
        """Held-out perplexity; keeps the weights where it is the best so far, and saves all.

        Every process computes it, the first one writes.
        """
        standing, first = self.standing, self.args.process_index == 0
        self.pupil.eval()
        found = perplexity(self._logits, self.data.held_out)
        standing.checked(found)
        if found < standing.best or len(standing.checks) == 1:
            standing.best, standing.best_step = found, standing.step
            if first:
                state.save(self.best, standing, self.learning)
        standing.seconds = self.earlier + time.monotonic() - self.begun
        if first:
            state.save(self.file, standing, self.learning, self.optimizer)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.pupil(tokens.to(self.args.device), use_cache=False).logits
        return found


class Watch(TrainerCallback):
    """Tells a Learner where the Trainer's loop is."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        learner = self.learner
        if learner.standing.step:
            state.restore(learner.file, learner.learning, learner.optimizer)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.learner.draw()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.learner.judge()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.learner.count()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.learner.end_step()


def _arguments(
    settings: Settings, directory: Path, device: torch.device | str, width: int, model: Any
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        max_steps=1,
        learning_rate=settings.lr,
        weight_decay=0.0,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        seed=settings.seed,
        use_cpu=torch.device(device).type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
    )
    own = max(1, settings.batch // arguments.world_size)  # windows a step of a process
    fitting = max(1, LOGITS // (width * model.config.vocab_size))
    together = max(n for n in range(1, min(own, fitting) + 1) if own % n == 0)
    arguments.per_device_train_batch_size = together
    arguments.gradient_accumulation_steps = own // together
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several without a launcher would be nn.DataParallel
    return arguments
