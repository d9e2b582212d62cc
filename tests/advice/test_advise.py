"""Answers checked by hand arithmetic, on graphs and offers small enough to follow."""

from __future__ import annotations

import datetime
import math
from dataclasses import replace

import pytest

from plait.advice.advise import advise
from plait.advice.explain import FIGURES, explain
from plait.advice.interruptions import expected_hours
from plait.advice.needs import Needs, amount
from plait.advice.words import paragraph, warnings
from plait.advice.work import as_samples, work_of
from plait.cost.architecture import Architecture, build_graph
from plait.errors import RequestError
from plait.hardware.offers import Offer
from plait.schema import Cluster, Device, Graph, Group, Operator, ParameterSpec, Segment, TensorSpec
from plait.units import gib

SMALL = build_graph(
    Architecture(
        name="small", layers=8, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64, vocab=16384, seq_len=512
    )
)  # fmt: skip
TODAY = datetime.date(2026, 8, 30)


def offer(part="NVIDIA H100 SXM5", usd=24.0, spot=None, cloud="aws", name="p5", count=8, region="us-east-1", **more):
    values = {
        "cloud": cloud, "instance_type": name, "accelerator": part, "count": count, "vcpus": 8.0, "memory_bytes": 1e12,
        "region": region, "usd_per_hour": usd, "spot_usd_per_hour": spot, "as_of": "2026-08-20", "source": "a test",
    }  # fmt: skip
    return Offer(**{**values, **more})


def ask(*offers, local=None, **needs):
    needs.setdefault("tokens", 1e11)
    return advise(SMALL, Needs(**needs), offers=offers, local=local, today=TODAY)


def test_hours_times_price_is_dollars():
    """The dollars are the instance's price, times the instances, times tokens over tokens a second."""
    for answer in ask(offer(), offer("NVIDIA A100 SXM4 80GB", 12.0, name="p4de")).answers:
        price = answer.on_demand
        hours = 1e11 / answer.estimate.tokens_per_s / 3600

        assert answer.hours == pytest.approx(hours)
        assert price.usd == pytest.approx(hours * price.offer.usd_per_hour * answer.count / 8)


def test_memory_parts_add_up():
    """Parts of the fullest rank, and what is free beside them, are what a rank may use."""
    best = ask(offer()).answers[0]
    shown = best.summary()

    assert sum(shown["memory_parts_gib"].values()) == pytest.approx(shown["peak_memory_gib"])
    assert shown["peak_memory_gib"] + shown["headroom_gib"] == pytest.approx(gib(0.94 * 80 * 2**30))


def test_twice_the_tokens_take_twice_the_hours():
    """And twice the money and energy."""
    once, twice = ask(offer(), tokens=1e11).answers, ask(offer(), tokens=2e11).answers
    again = {answer.name: answer for answer in twice}
    first = once[0]

    assert again[first.name].hours == pytest.approx(2 * first.hours)
    assert again[first.name].on_demand.usd == pytest.approx(2 * first.on_demand.usd)
    assert again[first.name].energy_kwh == pytest.approx(2 * first.energy_kwh)


def test_a_cheaper_identical_offer_wins():
    """Of two sellers of the same machine the cheaper one is taken, and halving a price halves the answer."""
    dear = ask(offer(usd=24.0))
    both = ask(offer(usd=24.0), offer(usd=12.0, cloud="lambda", name="8xH100"))

    assert both.answers[0].on_demand.offer.cloud == "lambda"
    assert both.answers[0].on_demand.usd == pytest.approx(dear.answers[0].on_demand.usd / 2)


def test_answers_are_ranked_and_the_front_is_a_front():
    """By dollars, or by hours; on the front who is faster pays more."""
    sellers = offer(), offer("NVIDIA A100 SXM4 80GB", 12.0, name="p4de"), offer("NVIDIA L4", 2.0, name="g6")
    cheap, quick = ask(*sellers), ask(*sellers, minimize="time")
    usd = [answer.on_demand.usd for answer in cheap.answers]
    hours = [answer.hours for answer in quick.answers]

    assert usd == sorted(usd)
    assert hours == sorted(hours)
    assert quick.answers[0].hours <= cheap.answers[0].hours
    for faster, slower in zip(cheap.front, cheap.front[1:], strict=False):
        assert faster.hours <= slower.hours
        assert faster.on_demand.usd > slower.on_demand.usd


def test_interruptions_cost_half_an_interval_and_a_restart():
    """Two instances, each lost every five days: 0.4 a day, each for 15 + 10 minutes, by hand."""
    lost = 0.4 / 24 * 25 / 60
    best = ask(offer(spot=8.0), spot=True).answers[0]

    assert expected_hours(100, instances=2, per_day=0.2, checkpoint_minutes=30, restart_minutes=10) == pytest.approx(
        100 / (1 - lost)
    )
    assert expected_hours(1, instances=1000, per_day=5, checkpoint_minutes=60, restart_minutes=60) == math.inf
    assert best.spot.hours > best.hours
    assert best.spot.usd == pytest.approx(best.spot.hours * 8.0 * best.instances)


def test_machines_that_are_taken_away_too_often_are_no_answer():
    """Where no work is done between two interruptions, that is said."""
    with pytest.raises(RequestError, match="come faster than the work"):
        ask(offer(spot=8.0), spot=True, interruptions_per_day=1000.0)


def test_no_price_is_not_free():
    """Offers without the price that is ranked by, and parts without any offer, are listed as such."""
    found = ask(offer(), offer("NVIDIA A100 SXM4 80GB", None, name="auction", spot=1.0))

    assert {answer.accelerator for answer in found.answers} == {"NVIDIA H100 SXM5"}
    assert any(e.need == "unpriced" and "auction" in e.example for e in found.excluded)
    assert "Intel Gaudi3" in found.unpriced
    assert "NVIDIA A100 SXM4 80GB" in found.unpriced


def test_this_computer_is_the_answer_to_a_small_model():
    """A model that this computer trains within a day needs no rent."""
    device = Device(
        name="cpu", peak_flops={"fp32": 1e12}, memory_bytes=64e9, memory_bandwidth=5e10, category="cpu", family="local"
    )
    here = Cluster(name="1xcpu", groups=(Group(device=device, count=1, usd_per_hour=0.0),), links=())
    small, large = ask(offer(), local=here, tokens=1e6), ask(offer(), local=here, tokens=1e12)

    assert small.answers[0].accelerator == "this computer's CPU"
    assert paragraph(small).startswith("Take this computer")
    assert large.answers[0].accelerator == "NVIDIA H100 SXM5"


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"budget": 0.01}, "no offer meets --budget"),
        ({"deadline": 1e-6}, "no offer meets --deadline"),
        ({"require": ("region=eu",)}, "no offer meets --require region=eu"),
        ({"require": ("confidential", "region=eu")}, "--require confidential and --require region=eu clash"),
        ({"require": ("region=eu",), "clouds": ("AWS",)}, "--require region=eu clashes with --clouds"),
        ({"spot": True}, "no offer meets --spot"),
        ({"only": ("Inferentia2",)}, "cannot train"),
        ({"only": ("Gaudi3",)}, "Intel Gaudi3 has no on-demand price here"),
        ({"clouds": ("awss",)}, "'awss' is not a cloud"),
        ({"only": ("H1000",)}, "'H1000' is not in the catalogue"),
        ({"only": ("H100-SXM",), "avoid": ("Hopper",)}, "--only H100-SXM and --avoid Hopper clash"),
        ({"require": ("confidental",)}, "'confidental' is not a need"),
        ({"only": ("nnvm",)}, "NNVM has been retired"),
        ({"tokens": -1.0}, "--tokens -1 must be above 0"),
        ({"tokens": 1e300}, "no offer finishes"),
        ({"precision": "int8"}, "--precision int8 and --task train clash"),
        ({"precision": "bf15"}, "--precision 'bf15' is not one of"),
        ({"require": ("region=",)}, "names no region"),
        ({"require": ("region=mars",)}, "'mars' is no region"),
        ({"require": ("jurisdiction=us-east-1",)}, "'us-east-1' is no jurisdiction"),
        ({"only": ("NVIDIA K80",)}, "PyTorch 2 has no build for Kepler"),
        ({"grid_kg_per_kwh": -1.0}, "--grid -1 must be 0 or above"),
    ],
)
def test_what_cannot_be_met_says_why_and_what_is_nearest(needs, says):
    """Status 2, the clash in the first line, the way out in the hint."""
    with pytest.raises(RequestError) as caught:
        ask(offer(), **needs)

    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 2


def test_a_precision_that_no_part_on_offer_has_is_named():
    """It is a need like others."""
    ampere = offer("NVIDIA A100 SXM4 80GB", 12.0, name="p4de")
    with pytest.raises(RequestError, match="no offer meets --precision fp8"):
        ask(ampere, precision="fp8")
    with pytest.raises(RequestError, match="--precision fp8 and --only clash: NVIDIA A100"):
        ask(ampere, offer(), precision="fp8", only=("A100-SXM-80GB",))


def test_budget_and_deadline_that_clash_name_both_ways_out():
    """Each can be met alone: the cheapest in time and the fastest within the budget are given."""
    free = ask(offer())
    slow, fast = max(free.front, key=lambda a: a.hours), min(free.front, key=lambda a: a.hours)
    with pytest.raises(RequestError, match="clash: each can be met, not both") as caught:
        ask(offer(), budget=slow.on_demand.usd * 1.01, deadline=fast.hours * 1.01)

    assert "cheapest within" in caught.value.hint
    assert "fastest within the budget" in caught.value.hint


def test_a_model_that_no_instance_holds_says_so():
    """Where instances are not joined, the refusal names that, not a plan."""
    large = build_graph(Architecture(name="large", layers=32, hidden=4096, ffn_hidden=14336, heads=32, kv_heads=8,
                                     head_dim=128, vocab=32000, seq_len=2048))  # fmt: skip
    alone = offer("NVIDIA H100 NVL", cloud="azure", name="Standard_NCC40ads_H100_v5", count=1, usd=7.0)
    with pytest.raises(RequestError, match="not known to be joined") as caught:
        advise(large, Needs(require=("confidential",)), offers=(alone,), today=TODAY)

    assert "--require" in caught.value.hint


def test_what_takes_longer_than_the_usual_horizon_is_still_answered():
    """Without a deadline the answer is the best there is, with a note."""
    found = ask(offer("NVIDIA L4", 1.0, name="g2", count=1), tokens=3e12)

    assert found.answers[0].hours > 90 * 24
    assert any("90 days" in note for note in found.notes)


def test_what_takes_years_longer_than_the_fastest_is_no_answer():
    """Where nothing is done within the horizon, cheaper parts that take far longer than the fastest are left out."""
    sellers = [offer("NVIDIA L4", usd, cloud="vast", name=f"{n}x", count=n) for n, usd in ((1, 0.01), (8, 20.0))]
    found = ask(*sellers, tokens=3e12)

    assert {a.count for a in found.answers} == {8}


def test_the_first_answer_can_be_launched():
    """A Volta states no bf16, and plait's runtime trains in bf16 and fp32: fp16 is planned on request only."""
    volta = offer("NVIDIA V100 SXM2 16GB", 2.0, cloud="vast", name="8x", count=8)
    plain, other = ask(volta).answers[0], ask(volta, any_plan=True).answers[0]
    asked = ask(volta, precision="fp16").answers[0]

    assert plain.estimate.plan.precision == "fp32"
    assert not plain.not_executable
    assert other.estimate.plan.precision == asked.estimate.plan.precision == "fp16"
    assert any("fp16" in why for why in other.not_executable)
    assert other.hours < plain.hours
    assert any("CUDA 12.6" in reason for reason in plain.compatibility.reasons)


def test_expert_parallelism_is_planned_and_said():
    """Plait's runtime executes none; --runnable leaves it out and costs more."""
    sparse = build_graph(Architecture(name="sparse", layers=4, hidden=1024, ffn_hidden=4096, heads=16, kv_heads=16, head_dim=64,
                                      vocab=16384, seq_len=512, experts=64, topk=2, expert_ffn=4096))  # fmt: skip
    sellers = (offer("NVIDIA A100 SXM4 40GB", cloud="vast", name="8x"),)
    usual = advise(sparse, Needs(tokens=1e10), offers=sellers, today=TODAY)
    strict = advise(sparse, Needs(tokens=1e10, runnable_only=True), offers=sellers, today=TODAY).answers[0]

    assert usual.answers[0].estimate.plan.ep > 1
    assert "--runnable leaves such plans out" in paragraph(usual)
    assert strict.estimate.plan.ep == 1
    assert not strict.not_executable
    assert strict.hours > usual.answers[0].hours
    with pytest.raises(RequestError, match="--any-plan and --runnable clash"):
        Needs(any_plan=True, runnable_only=True)


def test_precisions_that_are_asked_for():
    """tf32 is fp32 at the tensor cores' rate; fp8 is faster than bf16, which is faster than tf32 and fp32."""
    hours = {p: ask(offer(), precision=p).answers[0].hours for p in ("fp32", "tf32", "bf16", "fp8")}
    tf32 = ask(offer(), precision="tf32").answers[0]

    assert hours["fp8"] < hours["bf16"] < hours["tf32"] < hours["fp32"]
    assert tf32.estimate.plan.precision == "fp32"
    assert tf32.compatibility is not None
    assert tf32.compatibility.precision == "tf32"


def test_columns_of_categories_are_no_sequence():
    """A recommender's integer input has a table for each column: its work is samples, one pass over many clicks."""
    ids = TensorSpec(name="ids", shape=(64, 8), dtype="int64")
    columns = [TensorSpec(name=f"c{i}", shape=(64,), dtype="int64") for i in range(8)]
    looked = [TensorSpec(name=f"e{i}", shape=(64, 16), dtype="float32") for i in range(8)]
    operators = tuple(
        Operator(name=f"op{i}", target="aten.embedding.default", kind="embedding", module="", inputs=(c,), outputs=(e,),
                 parameters=(f"t{i}",))
        for i, (c, e) in enumerate(zip(columns, looked, strict=True))
    )  # fmt: skip
    tables = tuple(ParameterSpec(name=f"t{i}", shape=(100_000, 16), dtype="float32") for i in range(8))
    segment = Segment(index=0, name="", operators=operators, parameters=tuple(t.name for t in tables), live_in=(), live_out=(),
                      equals=0)  # fmt: skip
    graph = Graph(
        name="clicks", batch=64, tokens_per_sample=8, inputs=(ids,), parameters=tables, buffers=(), segments=(segment,)
    )

    found = as_samples(graph)
    work = work_of(found, Needs(), 64)

    assert found.tokens_per_sample == 1
    assert as_samples(SMALL) is SMALL
    assert work.unit == "samples"
    assert work.tokens == 4_195_197_692
    assert work.batch == 16_384


def test_unknown_is_never_yes():
    """An offer whose country nobody states does not lie in the EU; a VM is not known to be single-tenant."""
    sellers = offer(cloud="crusoe", region="any"), offer(cloud="verda", region="FIN-01", usd=99.0)
    bare = offer(cloud="oci", name="BM.GPU.H100.8", region="af-casablanca-1", usd=99.0)

    assert {a.on_demand.offer.cloud for a in ask(*sellers, require=("region=eu",)).answers} == {"verda"}
    assert {a.on_demand.offer.cloud for a in ask(*sellers, bare, require=("single-tenant",)).answers} == {"oci"}


def test_old_prices_are_said_to_be_old():
    """Older than 90 days, with the age; without a date, too."""
    old = ask(offer(as_of="2026-01-01")).answers[0].on_demand
    undated = ask(offer(as_of="catalogue v8")).answers[0].on_demand

    assert old.age_days == 241
    assert "241 days old" in old.warning
    assert "no date" in undated.warning
    assert ask(offer()).answers[0].on_demand.warning == ""


def test_every_figure_can_be_traced():
    """Each has a formula, and inputs with sources that give the value where it is a product."""
    found = ask(offer(spot=8.0), grid_kg_per_kwh=0.4)
    told = {name: explain(found, name) for name in FIGURES}
    inputs = {item["name"]: item["value"] for item in told["usd"]["inputs"]}

    assert all(item["source"] for figure in told.values() for item in figure["inputs"])
    assert told["usd"]["value"] == pytest.approx(
        inputs["tokens"] / inputs["tokens_per_s"] / 3600 * inputs["usd_per_hour"]
    )
    assert told["memory"]["value"] == pytest.approx(sum(item["value"] for item in told["memory"]["inputs"]))
    for name in ("step_time", "memory"):
        assert told[name]["value"] == pytest.approx(sum(item["value"] for item in told[name]["inputs"]))
    assert told["co2"]["value"] == pytest.approx(0.4 * told["energy"]["value"])
    with pytest.raises(RequestError, match="not a figure"):
        explain(found, "dollars")


def test_defaults_say_why():
    """Chinchilla's 20 tokens a parameter, and a batch below GPT-3's."""
    found = advise(SMALL, Needs(), offers=(offer(),), today=TODAY)

    assert found.work.tokens == 20 * SMALL.numel
    assert "Chinchilla" in found.work.tokens_why
    assert found.work.batch == 512
    assert any("no price here" in line for line in warnings(found))


def test_marketplace_hosts_are_never_joined():
    """Neither are instances smaller than the cloud's largest: nothing says that a network lies between them."""
    vast = ask(offer(cloud="vast", region="US", name="8x"))
    halves = ask(offer(count=4, name="half", usd=1.0), offer())

    assert {a.instances for a in vast.answers} == {1}
    assert all(a.instances == 1 for a in halves.answers if a.on_demand.offer.count == 4)


@pytest.mark.parametrize(
    ("text", "value"), [("1.5T", 1.5e12), ("300B", 3e11), ("20m", 2e7), ("5_000", 5000.0), ("2e9", 2e9)]
)
def test_amounts_are_read_as_people_write_them(text, value):
    assert amount("--tokens", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["many", "", "-3", "nan", "inf", "0"])
def test_amounts_that_are_none_are_refused(text):
    with pytest.raises(RequestError, match="--tokens"):
        amount("--tokens", text)


def test_a_part_that_cannot_train_is_left_out_with_the_reason():
    """Inferentia runs compiled inference graphs only."""
    found = ask(offer(), offer("AWS Inferentia2", 1.0, name="inf2", count=1))

    assert any("cannot train" in e.reason and "inf2" in e.example for e in found.excluded)


def test_the_bound_is_below_what_is_found():
    """No answer is faster than its arithmetic at the cost model's own rates."""
    from plait.advice.bound import count_work, seconds_per_sample
    from plait.cost.calibration import load_calibration
    from plait.hardware.catalogue import find

    each = seconds_per_sample(count_work(SMALL), find("H100-SXM").device, "bf16", load_calibration())
    for answer in ask(offer()).answers:
        assert answer.hours >= 1e11 / SMALL.tokens_per_sample * each / answer.count / 3600


def test_a_shape_that_cannot_be_estimated_is_listed():
    """A part whose network between nodes nobody states is estimated as far as it goes, the rest with the reason."""
    found = ask(replace(offer("NVIDIA T4", 1.0, name="g4"), count=4.0), tokens=1e9)

    assert found.answers
    assert not found.failed or "not known" in found.failed[0][1]
