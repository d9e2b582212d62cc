"""The command line: exit status, where things are printed, and how mistakes read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import plait
from plait.cli.main import run
from plait.errors import ParityError, PlanError


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch):
    """Stands in for `plait.run.launch`; what it is asked for lands in `asked`."""
    import types

    module = types.ModuleType("plait.run.launch")
    module.asked = {}
    module.answer = {"ok": True, "plan": "dp=2", "devices": 2, "steps": 3, "max_loss_diff": float("nan"), "worst": []}

    def record(**arguments):
        module.asked = arguments
        if isinstance(module.answer, BaseException):
            raise module.answer
        print("chatter of a library")
        return module.answer

    module.run_train = module.run_verify = module.run_verify_forward = record
    monkeypatch.setitem(sys.modules, "plait.run.launch", module)
    return module


VERIFY = ["verify", "a.py:job", "--devices", "2", "--plan", "dp=2"]


def test_done_is_0(launch, capsys):
    """A result is printed for a person."""
    assert run(VERIFY) == 0
    assert "parity holds: dp=2 on 2 processes, 3 steps" in capsys.readouterr().out


def test_parity_not_held_is_1(launch, capsys):
    """The result is printed all the same."""
    launch.answer = {**launch.answer, "ok": False, "worst": [{"name": "fc1.weight", "gradient": 0.12}]}

    assert run(VERIFY) == 1
    out = capsys.readouterr().out
    assert "does NOT hold" in out
    assert "fc1.weight" in out


def test_json_is_alone_on_stdout(launch, capsys):
    """One object, valid JSON though a figure is NaN; chatter goes to stderr."""
    assert run([*VERIFY, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["max_loss_diff"] is None
    assert "chatter" in captured.err


@pytest.mark.parametrize(
    ("problem", "status", "first"),
    [
        (PlanError("plan: 3 is odd", hint="use 2"), 2, "error: plan: 3 is odd\n\nhint: use 2\n"),
        (ParityError("fc1 differs"), 1, "error: fc1 differs\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    ],
)
def test_what_went_wrong_is_short_and_has_its_status(launch, capsys, problem, status: int, first: str):
    """First line what and where, then what to change; no traceback."""
    launch.answer = problem

    assert run(VERIFY) == status
    captured = capsys.readouterr()
    assert captured.err == first
    assert captured.out == ""


def test_one_process_of_torchrun_says_what_all_met(launch, capsys, monkeypatch):
    """A wrong request is refused by every process and printed by the first."""
    launch.answer = PlanError("plan: no")
    monkeypatch.setenv("RANK", "3")

    assert run(VERIFY) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["verify", "a.py:job", "--plna", "dp=2"], "--plna"),
        (["verify", "a.py:job"], "Missing option '--plan'"),
        (["train"], "Missing argument 'TARGET'"),
        (["train", "a.py:job", "--devices", "0"], "--devices"),
        (["train", "a.py:job", "--steps", "many"], "--steps"),
    ],
)
def test_a_mistyped_command_is_2(capsys, arguments: list[str], message: str):
    """The message names what was typed and where help is."""
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert "--help lists what it takes" in err


def test_train_hands_on_what_was_typed(launch):
    """Each option arrives under its own name."""
    words = (
        "train a.py:job?x=1 --devices 4 --plan dp=2,pp=2 --steps 9 --batch 8 --seed 3 --data t.txt --run-dir r --resume "
        "--eval-every 2 --checkpoint-every 5 --checkpoint-minutes 1.5 --keep 3 --log-every 7"
    )
    assert run(words.split()) == 0
    asked = {key: str(value) for key, value in launch.asked.items()}

    assert asked == {
        "target": "a.py:job?x=1",
        "devices": "4",
        "plan": "dp=2,pp=2",
        "steps": "9",
        "batch": "8",
        "seed": "3",
        "data": "t.txt",
        "run_dir": "r",
        "resume": "True",
        "eval_every": "2",
        "checkpoint_every": "5",
        "checkpoint_minutes": "1.5",
        "keep": "3",
        "log_every": "7",
        "json": "False",
    }


def test_train_shows_losses_last_and_then_the_sample(launch, capsys):
    """What the trained model wrote stands under the figures, the losses next to it."""
    launch.answer = {"loss": 2.5, "steps": 9, "sample": "entropy 3.2\n\ndef f():", "losses": [1.0]}

    assert run(["train", "a.py:job"]) == 0
    assert capsys.readouterr().out.endswith("steps  9\nloss   2.5\n\nentropy 3.2\n\ndef f():\n")


def test_version(capsys):
    """`plait --version` is the package's."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"plait {plait.__version__}\n"


def test_help_lists_only_verbs_that_exist(capsys):
    """Each listed verb has help of its own."""
    from plait.cli.main import _application

    verbs = [c.name for c in _application().registered_commands] + [g.name for g in _application().registered_groups]

    assert {"train", "verify", "doctor"} <= set(verbs)
    for verb in verbs:
        assert run([verb, "--help"]) == 0
        assert "Usage: plait" in capsys.readouterr().out


@pytest.mark.multi
def test_python_dash_m_is_the_same():
    """`python -m plait` has the same exit status and prints the same."""
    done = subprocess.run(
        [sys.executable, "-m", "plait", "train", "absent.py:job", "--plan", "dp=1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("error: target absent.py: no such file")


@pytest.mark.multi
def test_doctor_json():
    """`plait doctor --json` prints one object and nothing else on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "plait", "doctor", "--json"], capture_output=True, text=True, timeout=200, check=False
    )
    report = json.loads(done.stdout)

    assert done.returncode == (0 if report["ok"] else 1)
    assert {"group", "name", "state", "detail"} == set(report["checks"][0])
