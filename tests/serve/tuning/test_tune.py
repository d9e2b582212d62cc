"""The tuner keeps every measurement, its best follows from them, and a record gives the same settings without measuring."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plait.errors import ServeError
from plait.hardware.placement import place_here
from plait.serve.backend import Backend
from plait.serve.export import export
from plait.serve.registry import backend_at, backends
from plait.serve.served import load
from plait.serve.tuning.export import accurate, tuned, variant_rows
from plait.serve.tuning.record import Configuration, Record
from plait.serve.tuning.search import Runtime, Space
from plait.serve.tuning.trial import Trial
from plait.serve.tuning.tune import check_threads, load_tuned, tune

CORES = sorted(os.sched_getaffinity(0))


def _configuration(threads: int = 1, artefact: str = "a") -> dict[str, Any]:
    return {"artefact": artefact, "threads": threads, "cpus": [], "batch": 2, "wait": "", "knobs": {}}


def _trial(threads: int, *rounds: list[float], first: int = 1) -> dict[str, Any]:
    kept = [
        {"round": i + first, "calls_a_turn": 5, "sets": [2, 2] if len(seconds) == 20 else [], "seconds": seconds}
        for i, seconds in enumerate(rounds)
    ]
    return {"configuration": _configuration(threads), "rounds": kept, "error": ""}


def _record(*trials: dict[str, Any]) -> Record:
    return Record.of(trials, machine={}, goal="latency", seed=0, seconds=1.0, identities={"a": "onnxruntime fp32 0"})


def test_the_best_beats_the_default_in_the_last_round() -> None:
    """A lucky moment of an earlier round does not win against what was measured in turns with the default."""
    record = _record(_trial(1, [0.005] * 5, [0.004] * 20), _trial(2, [0.001] * 5), _trial(4, [0.004] * 5, [0.002] * 20))

    assert record.best.threads == 4
    assert record.ratio == pytest.approx(0.5)
    assert record.fastest["sample_ms"] == pytest.approx(1.0)
    assert record.default["p50_ms"] == pytest.approx(4.0)


def test_chance_does_not_win() -> None:
    """Faster by one per cent, by much in half of the turns, or in one set of processes: the default settings stay the best."""
    default = _trial(1, [0.002] * 20)
    slightly = _record(default, _trial(2, [0.00199] * 20))
    sometimes = _record(default, _trial(2, [0.001] * 10 + [0.003] * 10))
    one_set = _record(default, _trial(2, [0.001] * 15 + [0.004] * 5))

    assert slightly.best.threads == sometimes.best.threads == one_set.best.threads == 1
    assert slightly.ratio == 1.0


def test_the_default_need_not_run() -> None:
    """What could be measured is compared then."""
    broken = {"configuration": _configuration(8), "rounds": [], "error": "RuntimeError: no"}

    assert _record(broken, _trial(1, [0.002] * 5), _trial(2, [0.001] * 5)).best.threads == 2


def test_a_record_is_read_back_equal_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    """Its best has to be what its measurements say."""
    path = tmp_path / "tune.json"
    record = _record(_trial(1, [0.002] * 20), _trial(2, [0.001] * 20))
    record.write(path)
    again = Record.read(path)
    data = json.loads(path.read_text())
    data["best"]["threads"] = 1
    path.write_text(json.dumps(data))

    assert again == record
    with pytest.raises(ServeError, match="it was changed"):
        Record.read(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "plait tuning 1"}', '{"format": "other"}', "[" * 9999])
def test_a_broken_record_is_refused(text: str, tmp_path: Path) -> None:
    """In one line, with the file."""
    path = tmp_path / "tune.json"
    path.write_text(text)

    with pytest.raises(ServeError, match="malformed"):
        Record.read(path)
    with pytest.raises(ServeError, match="no such file"):
        Record.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("identities",), []),
        (("identities",), {"b": "x"}),
        (("machine",), "mine"),
        (("goal",), 3),
        (("trials", 0, "rounds", 0, "seconds", 0), float("nan")),
        (("trials", 0, "rounds", 0, "seconds", 0), -1.0),
        (("trials", 0, "rounds", 0, "seconds"), []),
        (("trials", 0, "rounds", 0, "calls_a_turn"), 0),
        (("trials", 0, "rounds", 0, "sets"), [0]),
        (("trials",), []),
    ],
)
def test_a_record_edited_by_hand_is_refused(where: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    """Whatever was put into it, there is a message and no traceback."""
    path = tmp_path / "tune.json"
    _record(_trial(1, [0.002] * 5)).write(path)
    data = json.loads(path.read_text())
    place = data
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    path.write_text(json.dumps(data))

    with pytest.raises(ServeError, match="tune record"):
        Record.read(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 0), ("threads", "1"), ("cpus", [-1]), ("knobs", {"a": []}), ("wait", "; rm"), ("batch", True)],
)
def test_hostile_settings_are_refused(key: str, value: Any) -> None:
    """They come from a file."""
    with pytest.raises((ValueError, TypeError)):
        Configuration.from_dict({**_configuration(), key: value})


def test_openmp_is_tied_to_cores_only_where_it_computes() -> None:
    """A runtime's own threads would inherit the main thread's one core."""
    one = Configuration.from_dict({**_configuration(2), "cpus": [0, 1], "wait": "PASSIVE"})
    waits = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}

    assert one.environment(openmp=False) == waits
    assert one.environment(openmp=True) == {**waits, "GOMP_CPU_AFFINITY": "0 1"}


def test_precisions_that_lost_too_much_are_not_tuned() -> None:
    """fp32 always is; int8 by its cosine."""
    rows = [
        {"status": "ok", "precision": "fp32", "folder": "a", "parity": [{"cosine": 1.0}]},
        {"status": "ok", "precision": "int8", "folder": "b", "parity": [{"cosine": 0.98}]},
        {"status": "failed", "precision": "fp32"},
    ]

    assert accurate(rows, 0.99) == [Path("a")]
    assert accurate(rows, 0.9) == [Path("a"), Path("b")]
    with pytest.raises(ServeError, match="cosine"):
        accurate(rows[1:], 0.99)


def _space(openmp: bool) -> Space:
    knobs = {"spinning": (True, False)}
    default = Configuration(artefact="a", threads=2, cpus=(), batch=1, wait="", knobs={})
    runtime = Runtime(knobs=knobs, interpreter=sys.executable, openmp=openmp)
    return Space(runtimes={"a": runtime}, threads=[1, 2], batches=[1], cores=[0, 1], default=default)


def test_only_what_changes_a_runtime_is_tried() -> None:
    """OpenMP's waiting is for runtimes whose threads are OpenMP's; a knob at its default is no other configuration."""
    own, openmp = _space(False), _space(True)

    assert {(c.threads, c.cpus, c.wait) for c in own.neighbours(own.default)} == {(1, (), ""), (2, (), "")}
    assert {c.wait for c in openmp.neighbours(openmp.default)} == {"", "PASSIVE", "ACTIVE"}
    assert [c.knobs for c in own.neighbours(own.default) if c.knobs] == [{"spinning": False}]
    assert all(own.plain(own.drawn(random.Random(i))).wait == "" for i in range(20))


def test_a_trial_runs_in_the_artefacts_own_interpreter(tmp_path: Path) -> None:
    """LiteRT's and TVM's packages are in environments of their own, which find plait and its entry points."""
    python = tmp_path / "python"
    seen = tmp_path / "seen"
    look = "from importlib import metadata; import plait; print(len(metadata.entry_points(group='plait.backends')))"
    python.write_text(f'#!/bin/sh\n{sys.executable} -S -c "{look}" > {seen}\necho \'{{"error": "seen"}}\'\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    trial = Trial(Configuration.from_dict(_configuration()), interpreter=str(python), openmp=False, limit=30)

    assert not trial.is_ready()
    assert trial.error == "seen"
    assert int(seen.read_text()) == len(backends())
    trial.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, torch.Tensor, dict[str, Any]]:
    """A folder with the artefact of the backend `torch` and a record of its tuning."""
    out = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs = torch.randn(2, 16)
    report = export(
        model, "torch", inputs=inputs, output=out, batch=(1, 2), threads=1, seconds=0, compiled=False, tune=6
    )
    return out, model, inputs, report


@pytest.mark.multi
def test_tuning_keeps_to_the_threads_that_were_asked_for(exported: Any) -> None:
    """`--threads` of the export are the counts to choose from; the confirmation is the default's last round, too."""
    out, _, _, report = exported
    record = Record.read(out / "tune.json")

    assert "error" not in report["tuned"]
    assert {trial["configuration"]["threads"] for trial in record.trials} == {1}
    assert record.trials[0]["last_round"] == max(t["last_round"] for t in record.trials if t["calls"])
    assert record.machine["cores"] == len(CORES)
    assert report["tuned"]["ratio"] <= 1.0


@pytest.mark.multi
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_trial_stands_still_when_it_is_not_its_turn(exported: Any) -> None:
    """Idle threads that spin would take the cores of the one whose turn it is; it ends all the same."""
    out, *_ = exported
    one = Configuration.from_dict({**_configuration(1, str(out / "torch")), "wait": "ACTIVE"})
    trial = Trial(one, interpreter=sys.executable, openmp=True, limit=60)

    def stands_still() -> bool:
        for _ in range(100):
            text = Path(f"/proc/{trial._process.pid}/stat").read_text()
            if text.rpartition(")")[2].split()[0] == "T":
                return True
            time.sleep(0.02)
        return False

    assert trial.is_ready(), trial.error
    assert stands_still()
    trial.measure(slow=False)
    assert len(trial.seconds) == 5
    assert stands_still()
    trial.close()
    assert trial._process.returncode is not None


@pytest.mark.multi
def test_a_server_takes_the_threads_of_its_placement(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as `plait.hardware.placement` chooses, and it says why; the user's own number wins; the report has both."""
    out, _, _, report = exported
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    chosen = load(out / "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = load(out / "torch")

    assert (chosen.threads, chosen.reason) == (place_here(environment={}).threads, place_here(environment={}).reason)
    assert own.threads == 1
    assert load(out / "torch", threads=2).threads == 2
    assert report["placement"]["reason"] == "as asked for"
    assert "bash" in (out / "serve.sh").read_text()
    with pytest.raises(ServeError, match="threads=0"):
        load(out / "torch", threads=0)


@pytest.mark.multi
def test_a_record_repeats_bit_for_bit(exported: Any) -> None:
    """The very settings, without a measurement: equal outputs, and the same report."""
    out, model, inputs, report = exported
    rows, path = report["rows"], out / "tune.json"
    before = path.read_bytes()
    served = load_tuned(path)
    again = tuned(rows, out, (1,), 0, "latency", 0.99, path, lambda backend, text: None)

    assert torch.equal(served(inputs), load_tuned(path)(inputs))
    torch.testing.assert_close(served(inputs), model(inputs))
    assert again["best"] == report["tuned"]["best"]
    assert not again["measured"]
    assert path.read_bytes() == before


@pytest.mark.multi
def test_a_record_of_another_machine(exported: Any, tmp_path: Path) -> None:
    """Cores that are missing are refused by number, another processor is warned of, and foreign knobs reach no runtime."""
    out, *_ = exported

    def changed(**best: Any) -> Path:
        data = json.loads((out / "tune.json").read_text())
        for one in (data["best"], data["trials"][0]["configuration"]):
            one.update({"threads": 1, "cpus": [], "knobs": {}, **best})
        data["identities"] = {data["best"]["artefact"]: next(iter(data["identities"].values()))}
        data["best"] = data["trials"][0]["configuration"]
        data["trials"] = data["trials"][:1]
        data["machine"]["processor"] = "Z80"
        (tmp_path / "tune.json").write_text(json.dumps(data))
        return tmp_path / "tune.json"

    with pytest.raises(ServeError, match="core 4096 is more than this process may use") as caught:
        load_tuned(changed(cpus=[4096]))
    assert "Z80" in caught.value.hint
    with pytest.raises(ServeError, match="999 threads"):
        load_tuned(changed(threads=999))
    with pytest.warns(UserWarning, match="another machine"):
        load_tuned(changed())
    shutil.copytree(out / "torch", tmp_path / "torch")  # the whole folder was moved
    with pytest.warns(UserWarning, match="another machine"):
        assert load_tuned(changed(artefact="gone/torch")).folder == tmp_path / "torch"
    with pytest.warns(UserWarning, match="Z80"), pytest.raises(ServeError, match="no setting shell='rm'"):
        load_tuned(changed(knobs={"shell": "rm"}))


@pytest.mark.multi
def test_what_cannot_be_tuned(exported: Any) -> None:
    """Refused before a process starts."""
    out, *_ = exported
    folder = out / "torch"
    for wrong, words in (
        ({"batch": 3}, "outside of what it serves"),
        ({"threads": [99]}, "--threads 99 does not fit"),
        ({"threads": []}, "does not fit"),
        ({"seconds": 0}, "--tune-seconds"),
        ({"seconds": float("nan")}, "--tune-seconds"),
        ({"seconds": float("inf")}, "--tune-seconds"),
        ({"batch": (1, 2)}, "latency is of one batch"),
    ):
        with pytest.raises(ServeError, match=words):
            tune([folder], **{"seconds": 1, "batch": 1, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ServeError, match="no artefact"):
        tune([], seconds=1)
    with pytest.raises(ServeError, match="--threads 99"):
        export(nn.Linear(2, 2), "torch", inputs=torch.randn(2, 2), threads=99, tune=1)
    with pytest.raises(ServeError, match="does not fit"):
        check_threads([0])


def test_variants_are_made_within_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's other settings become rows; what fails, or has no time left, is left out and said."""

    class Slow(Backend):
        name = "slow"

        def variants(self, precision: str) -> tuple[str, ...]:
            return ("good", "bad")

        def export(self, subject: Any, folder: Path, precision: str) -> dict[str, Any]:
            return {}

        def load(self, artefact: Any) -> Any:
            return None

    class Job:
        def row(self, name: str, place: str, precision: str, *, variant: str, limit: float | None) -> dict[str, Any]:
            good = variant == "good"
            return {"backend": name, "variant": variant, "status": "ok" if good else "failed", "error": "broke"}

    monkeypatch.setattr("plait.serve.tuning.export.backend_at", lambda place: Slow())
    rows = [{"backend": "slow", "precision": "fp32", "status": "ok", "folder": "a", "export_s": 5.0}]

    def ask(seconds: float, wanted: str | None = None) -> Any:
        return variant_rows(rows, Job(), {"slow": ""}, seconds, wanted, lambda text: None)  # type: ignore[arg-type]

    assert [row["variant"] for row in ask(60.0)[0]] == ["good"]
    assert ask(60.0)[1] == ["slow bad: broke"]
    assert ask(1.0) == ([], [f"slow {v}: no time left for it (--tune-seconds)" for v in ("good", "bad")])
    assert [row["variant"] for row in ask(0.0, "slow fp32 good 123")[0]] == ["good"]


def test_inductor_has_variants_where_weights_can_be_packed() -> None:
    """Constants laid out for the kernels, and inductor's own tuner; not for int8."""
    backend = backend_at(backends()["aoti"])

    assert list(backend.variants("fp32")) == ["autotune", "freezing"]
    assert not backend.variants("int8")
