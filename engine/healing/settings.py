"""What is asked of a healing, and what cannot be done; known before torch is imported."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.architecture.config import ModelConfig
from engine.errors import InputError, check_choice

if TYPE_CHECKING:
    import torch

METHODS = ("linear", "scale", "qlora", "distil")
TRAINED = ("qlora", "distil")  # each as long as `steps` or `minutes` say; the others are fitted
RATES = {"weights": 1e-4, "scales": 1e-3}  # of scales: a step of Adam moves them by a thousandth
TRAIN = ("all", "around", "norms", "lora", "scales")
PRECISIONS = ("auto", "float32", "bfloat16")
_POSITIVE = (
    "steps", "minutes", "lr", "qlora_lr", "batch_tokens", "top", "check_every", "rank",
)  # fmt: skip
_MOST = {  # of what is counted: more takes years, or numbers that no array has
    "steps": 1 << 31, "check_every": 1 << 31, "batch_tokens": 1 << 24, "written": 1 << 31,
    "own": 1 << 31,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of a whole run; each training ends at `steps` or `minutes`, whichever comes first."""

    methods: tuple[str, ...]
    train: str = "all"
    steps: int | None = None
    minutes: float | None = None
    lr: float = RATES["weights"]
    seed: int = 0
    window: int = 512  # tokens a window
    batch_tokens: int = 2048  # tokens a step, in whole windows
    top: int = 64  # teacher's logits kept a position
    check_every: int = 20  # steps between two checks, each of which is saved
    patience: int = 5  # checks without improvement, after which distil stops
    rank: int = 16  # of LoRA
    warm_up: float = 0.1  # share of the run
    clip: float = 1.0  # norm of the gradient
    qlora_lr: float = 3e-4
    dropout: float = 0.05  # of qlora, before A
    warm_up_steps: int = 100  # of qlora, at most: `warm_up` holds for shorter runs
    adapter: bool = False  # stays beside its 4-bit base
    written: int = 0  # tokens that the teacher writes, beside the text
    own: int = 0  # tokens that the healed model writes, for a second round
    residual: float = 0.0  # weight of the streams' error at the end of the cuts (streams.py)
    precision: str = "auto"  # of the student's products: float32, bfloat16

    def __post_init__(self) -> None:
        _check_methods(self.methods)
        check_choice("train", self.train, TRAIN)
        check_choice("precision", self.precision, PRECISIONS)
        if not 0 <= self.seed < 1 << 32:  # what transformers takes
            raise InputError(f"seed: expected 0 to {(1 << 32) - 1}, found {self.seed}")
        if self.written < 0:
            raise InputError(f"self: expected at least 0 tokens, found {self.written}")
        if self.own < 0:
            raise InputError(f"own: expected at least 0 tokens, found {self.own}")
        if self.own and self.window < 4:  # half of one holds a beginning and what follows
            raise InputError(f"own: expected windows of at least 4 tokens, found {self.window}")
        if self.own and (self.methods[-1] != "distil" or self.train == "scales"):
            raise InputError(
                "own: needs distil as the last method, and weights to train, not scales"
            )
        if self.written and not self.trained:
            raise InputError("self: needs distil or qlora among the methods")
        if not 0 <= self.residual < float("inf"):
            raise InputError(f"residual: expected a weight of at least 0, found {self.residual}")
        if self.residual and self.methods[-1] != "distil":
            raise InputError("residual: needs distil as the last method")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                said = name.removeprefix("qlora_").replace("_", "-")
                wanted = "a finite number" if value == float("inf") else "more than 0"
                raise InputError(f"{said}: expected {wanted}, found {value}")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                said = "self" if name == "written" else name.replace("_", "-")
                raise InputError(f"{said}: expected at most {most}, found {getattr(self, name)}")
        if self.window < 2:
            raise InputError(f"window: expected at least 2 tokens, found {self.window}")
        if self.trained and self.steps is None and self.minutes is None:
            raise InputError(f"{self.trained[0]}: expected --minutes or --steps, found neither")
        if self.adapter and self.methods[-1] != "qlora":
            raise InputError(
                f"adapter: needs qlora as the last method, found {','.join(self.methods)}"
            )

    def on(self, device: "torch.device | str") -> "Settings":
        """With the precision that is fast there, where none is asked for."""
        if self.precision != "auto":
            return self
        import torch  # whose older releases do not tell

        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = torch.device(device).type != "cpu" or able.get("amx_bf16") or able.get("avx512_bf16")
        return replace(self, precision="bfloat16" if fast else "float32")

    @property
    def trained(self) -> list[str]:
        """The methods that train, in order."""
        return [name for name in self.methods if name in TRAINED]

    @property
    def of_qlora(self) -> "Settings":
        """With the rate and the warm-up of qlora in the place of distil's."""
        short = self.warm_up if self.steps is None else self.warm_up_steps / self.steps
        return replace(self, lr=self.qlora_lr, warm_up=min(self.warm_up, short))

    @property
    def batch(self) -> int:
        """Windows a step."""
        return max(1, self.batch_tokens // self.window)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"methods": list(self.methods)}


@dataclass(frozen=True)
class Cut:
    """Dropped layers start .. stop - 1 (original numbers); `start` - 1 is the last kept before."""

    start: int
    stop: int


def find_cuts(config: ModelConfig) -> list[Cut]:
    """The runs of layers that `config` lacks, from left to right."""
    edges = [-1, *(entry.layer for entry in config.layers), config.total_layers]
    pairs = zip(edges, edges[1:], strict=False)
    return [Cut(left + 1, right) for left, right in pairs if right > left + 1]


def check_model(settings: Settings, config: ModelConfig, has_teacher: bool) -> None:
    """InputError where these methods cannot heal these layers; `has_teacher`: one that is named."""
    patches = [name for name in settings.methods if name not in TRAINED]
    cuts = find_cuts(config)
    if settings.window > config.max_context:
        raise InputError(
            f"window: expected up to the model's context of {config.max_context}, "
            f"found {settings.window}"
        )
    low_rank = settings.train == "lora" or "qlora" in settings.methods
    if low_rank and settings.rank > config.hidden_size:
        raise InputError(
            f"rank: expected up to the model's width of {config.hidden_size}, found {settings.rank}"
        )
    if settings.train == "scales" and settings.methods != ("distil",):
        raise InputError("train scales: needs --method distil alone")
    if settings.train == "scales" and not has_teacher:
        raise InputError("train scales: expected --teacher, the model before it was quantized")
    if has_teacher:
        needs = patches or (["--train around"] if settings.train == "around" else [])
        needs = needs or (["--residual"] if settings.residual else [])
        if cuts or needs:
            what = needs[0] if needs else "--drop"
            raise InputError(
                f"{what}: its layer numbers are the unpruned model's, so it excludes --teacher"
            )
        return
    if not cuts and settings.methods != ("qlora",):  # which needs no teacher
        raise InputError("nothing is dropped, so there is nothing to heal; give --plan or --drop")
    if patches and config.post_norm:
        raise InputError(
            f"{patches[0]}: a norm follows the down projection in {config.family}, so that nothing "
            "can be folded into it; distil works"
        )
    if patches and cuts[0].start == 0:
        raise InputError(
            f"{patches[0]}: layer 0 is dropped and no kept layer before it can mend it"
        )


def _check_methods(methods: Sequence[str]) -> None:
    for name in methods:
        if name not in METHODS:
            raise InputError(f"method: expected some of {', '.join(METHODS)}, found {name!r}")
    if not methods or len(set(methods)) < len(methods):
        raise InputError(f"method: expected each once, found {','.join(methods) or 'none'}")
    if {"linear", "scale"} <= set(methods):
        raise InputError("method: linear mends the magnitude too, so it excludes scale")
    if "distil" in methods[:-1]:
        raise InputError("method: distil comes last")
    if "qlora" in methods and set(methods[methods.index("qlora") + 1 :]) - {"distil"}:
        raise InputError("method: linear and scale come before qlora")
