"""TARGET -> Job from files and modules, and what a mistake is answered with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from plait.capture.job import Job
from plait.capture.target import check_target, load_target
from plait.errors import PlanError, TargetError

JOB = """
import torch
from torch import nn
import plait
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a file and gives the path as one would type it."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(text: str, name: str = "mine.py") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return name

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


RETURNS = "return plait.Job(nn.Linear(2, 2), batch=(torch.zeros(1, 2), None))"


def test_a_function_in_a_file(write):
    """A file and its function, named after the file."""
    path = write(f"{JOB}\ndef job():\n    {RETURNS}\n")
    job = load_target(f"{path}:job")

    assert isinstance(job, Job)
    assert job.name == "mine"


def test_arguments_take_the_type_of_annotation_or_default(write):
    """Annotations first, then default values; without either, text stays text."""
    path = write(
        f"{JOB}\nseen = {{}}\ndef job(a, b=1, c=0.5, d=True, e='x', f: int | None = None, g=None, h=(1, 2), *, i: float = 1):\n"
        f"    seen.update(locals())\n    {RETURNS}\n"
    )
    load_target(f"{path}:job?a=1&b=2&c=3&d=false&e=4&f=5&g=6&h=7,8&i=9")

    assert sys.modules["mine"].seen == {
        "a": "1",
        "b": 2,
        "c": 3.0,
        "d": False,
        "e": "4",
        "f": 5,
        "g": "6",
        "h": (7, 8),
        "i": 9.0,
    }


def test_every_process_draws_the_same_batch(write):
    """Whatever was drawn before, and what is drawn after is not touched."""
    path = write(
        "import random\nimport numpy as np\nimport torch\nimport plait\n\nSHIFT = torch.randn(2)\n\n"
        "def job():\n"
        "    batch = (torch.randn(4, 2) + SHIFT, torch.from_numpy(np.random.rand(4)) + random.random())\n"
        "    return plait.Job(lambda: torch.nn.Linear(2, 1), loss=lambda o, t: o.sum(), batch=batch)\n"
    )
    torch.manual_seed(1)
    first = load_target(f"{path}:job").batch
    after = torch.randn(3)
    torch.manual_seed(2)
    second = load_target(f"{path}:job").batch

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(after, torch.randn(3))


def test_a_sibling_can_be_imported_and_the_path_stays_clean(write):
    """The file's folder can be imported from while it loads and while its function runs, and not afterwards."""
    write("WIDTH = 3", "deep/sibling_of_target.py")
    write("DEPTH = 3", "deep/later_sibling_of_target.py")
    path = write(
        f"{JOB}\nfrom sibling_of_target import WIDTH\ndef job():\n    import later_sibling_of_target\n    {RETURNS}\n",
        "deep/mine.py",
    )
    before = list(sys.path)
    load_target(f"{path}:job")

    assert sys.path == before


def test_a_function_in_a_module(write):
    """A package of the working directory, as `python -m` would find it."""
    write(f"{JOB}\ndef make():\n    {RETURNS}\n", "some_package_of_mine/models.py")

    assert load_target("some_package_of_mine.models:make").name == "make"


def test_a_name_of_the_standard_library_hides_nothing(write):
    """A user's file may be called like a module that Python needs."""
    path = write(f"{JOB}\ndef job():\n    {RETURNS}\n", "statistics.py")
    load_target(f"{path}:job")
    import statistics

    assert statistics.mean([1, 3]) == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mine.py", "names no function"),
        ("absent.py:job", "target absent.py: no such file"),
        ("mien.py:job", "did you mean 'mine.py'"),
        ("no_such_package.models:job", "no module named 'no_such_package'"),
        ("mine.py:jobb", "no function 'jobb'; did you mean 'job'"),
        ("mine.py:VALUE", "is a int, not a function"),
        ("mine.py:nothing", "returned None, not a plait.Job"),
        ("mine.py:text", "returned a str, not a plait.Job"),
        ("mine.py:job?layer=2", "no argument 'layer'; did you mean 'layers'"),
        ("mine.py:job?layers=two", "layers=two is not a whole number"),
        ("mine.py:needs", "argument 'width' is missing"),
        (
            "mine.py:raises",
            r"target mine.py:raises raised ValueError: too wide\n\n  .*mine.py, line \d+, in build\n    raise",
        ),
        ("mine.py:leaves", "raised SystemExit"),
        ("broken.py:job", r"raised SyntaxError: .*\n\n  .*broken.py, line 2\n"),
        ("missing.py:job", "raised ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_mistake_is_answered_with_what_and_where(write, target: str, message: str):
    """Status 2 and a first line that names the target; the user's own line where their code raised."""
    write(
        f"{JOB}\nVALUE = 1\ndef job(layers=1):\n    {RETURNS}\ndef nothing():\n    pass\ndef text():\n    return 'x'\n"
        f"def needs(width):\n    {RETURNS}\ndef build():\n    raise ValueError('too wide')\n"
        "def raises():\n    return build()\ndef leaves():\n    raise SystemExit(3)\n"
    )
    write("x = 1\ndef job(:\n", "broken.py")
    write("import no_such_thing\n", "missing.py")
    before = list(sys.path)
    with pytest.raises(TargetError, match=message) as caught:
        load_target(target)

    assert caught.value.exit_status == 2
    assert sys.path == before


def test_a_first_look_needs_no_torch(write):
    """A missing file or function name is refused at once; what needs a look inside passes."""
    write("raise ValueError", "mine.py")
    for target, message in (
        ("absent.py:job", "no such file"),
        ("mine.py", "names no function"),
        ("x?y", "not name=value"),
    ):
        with pytest.raises(TargetError, match=message):
            check_target(target)

    for target in ("mine.py:job", "package.module:job", "hf:llama"):
        check_target(target)


def test_an_error_meant_for_a_person_passes_as_it_is(write):
    """What already says what and where is not wrapped."""
    path = write(
        "import plait\nfrom plait.errors import PlanError\ndef job():\n    raise PlanError('plan: no', hint='yes')\n"
    )
    with pytest.raises(PlanError, match="plan: no"):
        load_target(f"{path}:job")
