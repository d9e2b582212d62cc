"""What a person wants done and under which conditions, checked when it is stated."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from plait.advice.retired import refuse_retired
from plait.advice.runtimes import PRECISIONS
from plait.advice.security import NEEDS
from plait.errors import RequestError
from plait.hardware.catalogue import find, load_accelerators
from plait.schema.records import Record

__all__ = ["TASKS", "TRAINING_PRECISIONS", "Needs", "amount", "parts_named"]

TASKS = ("train", "finetune", "serve")
TRAINING_PRECISIONS = ("bf16", "fp16", "fp32", "tf32", "fp8")
_LEAVE_OUT = "give another number, or leave it out: the answer says what is then assumed"
_HOW = {
    "--tokens": "write for example 1.4T, 300B, 2e9 or 72",
    "--budget": "dollars, for example 500, 20k or 1.5M",
    "--deadline": "hours from the start, for example 72",
}
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def amount(option: str, text: str) -> float:
    """The number in `text`; 1.5T, 300B, 20M and 5k are understood.

    Raises:
        RequestError: it is no number above 0.
    """
    word = text.strip().removeprefix("$").replace("_", "").replace(",", "")
    scale = _SCALES.get(word[-1:].lower(), 1.0)
    try:
        value = float(word[:-1] if scale > 1 else word) * scale
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RequestError(f"{option} {text!r} is not a number above 0", hint=_HOW.get(option, _HOW["--tokens"]))
    return value


def parts_named(word: str) -> frozenset[str]:
    """Accelerators called `word`: a name, an alias or a family (Hopper).

    Raises:
        RequestError: there is none (the nearest names are in the hint), or it has been retired.
    """
    refuse_retired(word)
    family = [p.name for p in load_accelerators().values() if p.device.family.lower() == word.strip().lower()]
    return frozenset(family or [find(word).name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs(Record):
    """What is wanted. Dollars, hours, minutes and days as people state them; everything else in SI."""

    task: str = "train"
    tokens: float | None = None
    """Positions (samples where a sample has no sequence) to train on; None: a stated default."""
    batch: int | None = None
    """Global batch in samples; None: a stated default."""
    budget: float | None = None
    """Dollars."""
    deadline: float | None = None
    """Hours."""
    minimize: str = "usd"
    spot: bool = False
    """Rank and hold the budget against spot prices with their interruptions."""
    clouds: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    checkpoint_minutes: float = 30.0
    restart_minutes: float = 10.0
    interruptions_per_day: float = 0.2
    """Of one instance. An assumption without a source: clouds publish bands at best."""
    grid_kg_per_kwh: float | None = None
    trainable: str = "all"
    """What fine-tuning trains: all, lora:rank=N, a fraction, or a pattern of parameter names."""
    latency_ms: float | None = None
    """Between two tokens of a reply while the engine is full; of one batch where nothing is decoded."""
    first_token_ms: float | None = None
    """Of one prompt's prefill, nothing else waiting."""
    throughput: float | None = None
    """Output tokens (samples) per second that have to be served."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    """0: a plain forward, whatever the model is."""
    precision: str = ""
    """Empty: bf16 where a part has it (training), not quantised (serving)."""
    any_plan: bool = False
    """Training: also plans that plait's own runtime does not execute."""
    runnable_only: bool = False
    """Training: not even expert parallelism, which is planned and not run."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, n=1, cutoff=0.4)
            raise RequestError(
                f"--task {self.task!r} is not one of {', '.join(TASKS)}",
                hint=f"nearest: {near[0]}" if near else "train is the default",
            )
        self._check_task()
        if self.any_plan and self.runnable_only:
            raise RequestError("--any-plan and --runnable clash: each excludes the other", hint="drop one of the two")
        if self.runnable_only and self.precision in ("fp16", "fp8"):
            raise RequestError(
                f"--precision {self.precision} and --runnable clash: plait's runtime trains in bf16 and fp32",
                hint="drop one of the two",
            )
        if self.minimize not in ("usd", "time"):
            raise RequestError(f"--minimize {self.minimize!r} is not one of usd, time", hint="usd is the default")
        for name in ("tokens", "batch", "budget", "deadline", "checkpoint_minutes", "latency_ms", "first_token_ms", "throughput",
                     "input_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RequestError(f"--{name.replace('_', '-')} {value:g} must be above 0", hint=_LEAVE_OUT)
        for name in ("restart_minutes", "interruptions_per_day", "grid_kg_per_kwh", "output_tokens"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                option = "--grid" if name == "grid_kg_per_kwh" else f"--{name.replace('_', '-')}"
                raise RequestError(f"{option} {value:g} must be 0 or above", hint=_LEAVE_OUT)
        for need in self.require:
            name, sign, value = need.partition("=")
            known = bool(value.strip()) and f"{name}=" in NEEDS if sign else need in NEEDS
            if sign and not value.strip() and f"{name}=" in NEEDS:
                raise RequestError(
                    f"--require {need!r} is not a need: it names no {name}",
                    hint=f"write for example {name}=eu; known: {', '.join(NEEDS)}",
                )
            if not known:
                near = difflib.get_close_matches(need, NEEDS, n=2, cutoff=0.4)
                raise RequestError(
                    f"--require {need!r} is not a need that plait knows",
                    hint=(f"nearest: {', '.join(near)}; " if near else "") + f"known: {', '.join(NEEDS)}",
                )
        wanted, unwanted = self.wanted(), self.unwanted()
        if self.only and not wanted - unwanted:
            raise RequestError(
                f"--only {','.join(self.only)} and --avoid {','.join(self.avoid)} clash: nothing is left",
                hint="drop one of the two",
            )

    def _check_task(self) -> None:
        """Options that another task has."""
        serving = {
            "--latency-ms": self.latency_ms, "--first-token-ms": self.first_token_ms, "--throughput": self.throughput,
            "--input-tokens": self.input_tokens, "--output-tokens": self.output_tokens,
        }  # fmt: skip
        given = [name for name, value in serving.items() if value is not None]
        if self.task != "serve" and given:
            raise RequestError(
                f"{given[0]} and --task {self.task} clash: it is a need of serving", hint="add --task serve"
            )
        if self.task == "serve" and (self.any_plan or self.runnable_only):
            raise RequestError(
                f"--{'any-plan' if self.any_plan else 'runnable'} and --task serve clash: it chooses among plans of training",
                hint="drop one of the two",
            )
        if self.task != "finetune" and self.trainable != "all":
            raise RequestError(
                f"--trainable {self.trainable} and --task {self.task} clash: only fine-tuning trains a part of a model",
                hint="add --task finetune",
            )
        words = PRECISIONS if self.task == "serve" else TRAINING_PRECISIONS
        if self.precision and self.precision not in words:
            if self.precision in (*PRECISIONS, *TRAINING_PRECISIONS):
                what = "no runtime is known to serve" if self.task == "serve" else "nothing is trained"
                raise RequestError(
                    f"--precision {self.precision} and --task {self.task} clash: {what} in {self.precision}",
                    hint=f"--task {self.task} takes {', '.join(words)}",
                )
            near = difflib.get_close_matches(self.precision.lower(), words, n=1, cutoff=0.4)
            raise RequestError(
                f"--precision {self.precision!r} is not one of {', '.join(words)}",
                hint=f"nearest: {near[0]}"
                if near
                else "leave it out: bf16 where a part has it, and nothing is quantised",
            )
        if self.task == "serve" and self.batch is not None:
            raise RequestError(
                "--batch and --task serve clash: the batch of serving is chosen", hint="--latency-ms bounds it"
            )

    @property
    def runnable(self) -> bool:
        """Whether only plans count that plait's own runtime executes (expert parallelism apart); it has neither fp16 nor fp8."""
        return not self.any_plan and self.precision not in ("fp16", "fp8")

    def wanted(self) -> frozenset[str]:
        """Names of the parts in `only`, all where it is empty."""
        return frozenset().union(*(parts_named(w) for w in self.only)) if self.only else frozenset(load_accelerators())

    def unwanted(self) -> frozenset[str]:
        """Names of the parts in `avoid`."""
        return frozenset().union(*(parts_named(w) for w in self.avoid))
