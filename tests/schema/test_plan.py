"""Plans: degrees multiply to devices, text and files come back equal, and nonsense is refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import PlanError
from plait.schema import Plan

DEGREE = st.sampled_from((1, 2, 3, 4))
PLANS = st.builds(
    Plan,
    dp=DEGREE,
    fsdp=DEGREE,
    tp=DEGREE,
    pp=DEGREE,
    cp=DEGREE,
    zero=st.sampled_from((1, 2, 3)),
    microbatches=st.integers(0, 9),
    schedule=st.sampled_from(("gpipe", "1f1b", "interleaved", "zerobubble")),
    recompute=st.sampled_from(("none", "selective", "full")),
    precision=st.sampled_from(("fp32", "bf16")),
)


@given(PLANS)
def test_text_and_files_come_back_equal(plan: Plan) -> None:
    """SPEC, JSON and YAML."""
    import yaml

    assert Plan.parse(plan.spec()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(yaml.safe_load(plan.to_yaml())) == plan


@given(PLANS, st.data())
def test_uneven_shares_come_back_equal(plan: Plan, data: st.DataObject) -> None:
    """SPEC, JSON and YAML, runs of equal shares or none."""
    import yaml

    shares = data.draw(st.lists(st.integers(1, 3), min_size=plan.replicas, max_size=plan.replicas))
    uneven = replace(plan, batch_shares=tuple(shares))

    assert Plan.parse(uneven.spec()) == uneven
    assert Plan.from_json(uneven.to_json()) == uneven
    assert Plan.from_dict(yaml.safe_load(uneven.to_yaml())) == uneven


def test_shares_are_written_in_runs() -> None:
    """Four replicas of twelve samples and four of four."""
    assert Plan.parse("dp=8,batch_shares=4x12:4x4").batch_shares == (12,) * 4 + (4,) * 4
    assert Plan(dp=3, batch_shares=(2, 2, 1)).spec() == "dp=3,batch_shares=2x2:1"


@given(PLANS, st.integers(1, 200))
def test_bound_plans_fit_their_devices_and_batch(plan: Plan, batch: int) -> None:
    """Degrees multiply to the devices, and every replica has a sample in every microbatch."""
    try:
        bound = plan.bound(devices=plan.devices, batch=batch)
    except PlanError:
        assert batch < plan.replicas * max(1, plan.microbatches)
        return

    assert bound.devices == bound.dp * bound.fsdp * bound.tp * bound.pp * bound.cp
    assert batch >= bound.replicas * bound.microbatches >= 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dp", "'dp' is not NAME=VALUE"),
        ("dp=two", "dp=two is not a whole number"),
        ("dp=0", "dp=0 must be at least 1"),
        ("dp=2,batch_shares=3", "batch_shares has 1 shares, dp x fsdp = 2 replicas need one each"),
        ("dp=2,batch_shares=3:0", "a share must be at least 1"),
        ("dp=2,batch_shares=3:-1", "batch_shares=3:-1 is not SHARE:SHARE"),
        ("dp=2,batch_shares=", "batch_shares= is not SHARE:SHARE"),
        ("dp=2,batch_shares=999999999x1", "is not SHARE:SHARE"),
        ("dp=2,batch_shares=a:b", "is not SHARE:SHARE"),
        ("dp=2,dp=2", "dp is given twice"),
        ("ddp=2", "'ddp=2' is not NAME=VALUE with a known name"),
        ("schedule=fast", "schedule=fast is not one of gpipe"),
        ("zero=4", "zero=4 is not 1, 2 or 3"),
    ],
)
def test_nonsense_is_refused(text: str, says: str) -> None:
    """The first line says what and where."""
    with pytest.raises(PlanError, match=says):
        Plan.parse(text)


def test_devices_and_batch_that_do_not_fit() -> None:
    """Both numbers are shown, and what to type instead."""
    with pytest.raises(PlanError, match=r"needs 4 devices, --devices gives 8") as caught:
        Plan.parse("dp=2,pp=2").bound(devices=8)
    assert "--devices 4" in caught.value.hint
    with pytest.raises(PlanError, match=r"a batch of 7 is smaller than dp x fsdp x microbatches = 2 x 1 x 4 = 8"):
        Plan.parse("dp=2,pp=2,microbatches=4").bound(batch=7)


def test_files(tmp_path: Path) -> None:
    """A plan file may stand alone or under `plan:`; broken ones are named."""
    plan = Plan.parse("dp=2,pp=2")
    whole, inner, broken = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"
    whole.write_text(plan.to_yaml())
    inner.write_text("plan:\n" + "".join(f"  {line}\n" for line in plan.to_yaml().splitlines()))
    broken.write_text("dp: [1")

    assert Plan.load(str(whole)) == Plan.load(inner) == plan
    with pytest.raises(PlanError, match=r"plan file .*c\.yaml"):
        Plan.load(str(broken))
    with pytest.raises(PlanError, match=r"plan file .*none\.yaml"):
        Plan.load(str(tmp_path / "none.yaml"))


def test_cuts_and_recompute_by_segment() -> None:
    """What the text cannot say is checked as well."""
    plan = Plan(pp=3, cuts=(2, 5), recompute_segments={"0": "full"})

    assert plan.recompute_of(0) == "full"
    assert plan.recompute_of(1) == "none"
    with pytest.raises(PlanError, match="3 stages need 2 cuts"):
        Plan(pp=3, cuts=(2,))
    with pytest.raises(PlanError, match="must rise"):
        Plan(pp=3, cuts=(5, 2))
