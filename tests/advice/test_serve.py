"""Answers on serving, checked by hand arithmetic."""

from __future__ import annotations

import datetime

import pytest

from plait.advice.needs import Needs
from plait.advice.runtimes import choose_runtime, runtimes
from plait.advice.serve import advise_serving
from plait.advice.serve_words import SERVE_FIGURES, explain_serving, serve_paragraph, serve_warnings
from plait.cost.architecture import Architecture, build_graph
from plait.errors import RequestError
from plait.hardware.catalogue import find
from plait.hardware.offers import Offer
from plait.schema import Cluster, Device, Group
from plait.units import gib

MODEL = build_graph(
    Architecture(
        name="small", layers=8, hidden=2048, ffn_hidden=8192, heads=16, kv_heads=4, head_dim=128, vocab=32000, seq_len=1024
    )
)  # fmt: skip
HUGE = build_graph(
    Architecture(
        name="huge", layers=126, hidden=16384, ffn_hidden=53248, heads=128, kv_heads=8, head_dim=128, vocab=128256, seq_len=1024
    )
)  # fmt: skip
TODAY = datetime.date(2026, 8, 30)


def offer(
    part="NVIDIA H100 SXM5", usd=24.0, spot=None, cloud="aws", name="p5.48xlarge", count=8, region="us-east-1", **more
):
    values = {
        "cloud": cloud, "instance_type": name, "accelerator": part, "count": count, "vcpus": 8.0, "memory_bytes": 1e12,
        "region": region, "usd_per_hour": usd, "spot_usd_per_hour": spot, "as_of": "2026-08-20", "source": "a test",
    }  # fmt: skip
    return Offer(**{**values, **more})


ONE = offer(count=1, name="one", usd=3.0)
L4 = offer("NVIDIA L4", 0.8, name="g6.xlarge", count=1)


def ask(*offers, graph=MODEL, local=None, **needs):
    return advise_serving(graph, Needs(task="serve", **needs), offers=offers or (ONE, L4), local=local, today=TODAY)


def test_hours_times_price_is_dollars():
    """Tokens over tokens a second are hours, times the price are dollars; a million by default."""
    for answer in ask().answers:
        assert answer.hours == pytest.approx(1e6 / answer.throughput / 3600)
        assert answer.on_demand.usd == pytest.approx(answer.hours * answer.on_demand.offer.usd_per_hour)


def test_memory_parts_add_up_to_what_a_device_may_hold():
    """Weights, cache and activations, and what is free."""
    for answer in ask().answers:
        shown = answer.summary(ask().work)

        assert sum(shown["memory_parts_gib"].values()) == pytest.approx(shown["memory_gib"])
        total = find(answer.accelerator).device.memory_bytes
        assert shown["memory_gib"] + shown["headroom_gib"] == pytest.approx(gib(0.94 * total))


def test_twice_the_tokens_take_twice_the_hours():
    """And twice the dollars and energy."""
    once, twice = ask(tokens=1e9).answers[0], ask(tokens=2e9).answers[0]

    assert twice.hours == pytest.approx(2 * once.hours)
    assert twice.on_demand.usd == pytest.approx(2 * once.on_demand.usd)
    assert twice.energy_kwh == pytest.approx(2 * once.energy_kwh)


def test_a_cheaper_identical_offer_wins():
    """Of two sellers of one machine the cheaper is taken; half the price is half the dollars."""
    dear = ask(ONE).answers[0]
    both = ask(ONE, offer(count=1, name="h", usd=1.5, cloud="lambda")).answers[0]

    assert both.on_demand.offer.cloud == "lambda"
    assert both.on_demand.usd == pytest.approx(dear.on_demand.usd / 2)


def test_answers_are_ranked_and_the_front_is_a_front():
    """By dollars, or by latency; on the front who is quicker pays more."""
    cheap, quick = ask(), ask(minimize="time")
    usd = [a.on_demand.usd for a in cheap.answers]
    latency = [a.estimate.latency for a in quick.answers]

    assert usd == sorted(usd)
    assert latency == sorted(latency)
    for first, second in zip(cheap.front, cheap.front[1:], strict=False):
        assert first.estimate.latency <= second.estimate.latency
        assert first.on_demand.usd > second.on_demand.usd


def test_latency_bounds_the_batch():
    """A tighter bound is kept, with fewer sequences at once and dearer tokens."""
    free, tight = ask(ONE, latency_ms=1000.0).answers[0], ask(ONE, latency_ms=5.0).answers[0]

    assert tight.estimate.latency <= 5e-3
    assert tight.estimate.plan.batch < free.estimate.plan.batch
    assert tight.on_demand.usd > free.on_demand.usd


def test_throughput_sizes_the_fleet():
    """As many instances as the rate needs; all of them are paid for as long as the work comes in at that rate."""
    one = ask(ONE).answers[0]
    wanted = 2.5 * one.throughput
    fleet = ask(ONE, throughput=wanted).answers[0]

    assert fleet.instances == 3
    assert fleet.throughput >= wanted
    assert fleet.hours == pytest.approx(1e6 / wanted / 3600)
    assert fleet.on_demand.usd == pytest.approx(3 * 3.0 * fleet.hours)


def test_a_model_that_one_instance_does_not_hold_goes_over_several():
    """405 billion parameters in 16 bits are 810 GB: two instances of eight 80 GB devices, as a pipeline."""
    found = ask(offer(), graph=HUGE).answers[0]

    assert found.instances == 2
    assert found.estimate.plan.pp == 2
    assert found.estimate.plan.tp == 8


def test_quantised_weights_need_a_part_and_a_runtime_that_take_them():
    """fp8 halves the weights on a Hopper; an Ampere states no fp8 and is left out."""
    found = ask(ONE, offer("NVIDIA A100 SXM4 80GB", 1.0, count=1, name="a"), precision="fp8")

    assert {a.accelerator for a in found.answers} == {"NVIDIA H100 SXM5"}
    assert any("fp8" in e.reason for e in found.excluded)
    assert found.answers[0].estimate.memory.weights < 0.75 * ask(ONE).answers[0].estimate.memory.weights


def test_runtimes_refuse_what_their_documentation_leaves_out():
    """TensorRT-LLM is not taken on a Volta, nor is anything that decodes on the first Inferentia."""
    volta, _ = choose_runtime(find("NVIDIA V100 SXM2 16GB"), decodes=True)
    old, why = choose_runtime(find("Inferentia1"), decodes=True)

    assert volta is not None
    assert volta.runtime == "vllm"
    assert volta.precision == "fp16"
    assert old is None
    assert "key-value cache" in why
    assert all(r.source for r in runtimes())


def test_a_slice_is_a_share_of_its_part():
    """An eighth of an L4 has an eighth of its memory, and says that it is shared."""
    small = build_graph(Architecture(name="tiny", layers=2, hidden=256, ffn_hidden=512, heads=4, kv_heads=4, head_dim=64,
                                     vocab=1000, seq_len=128))  # fmt: skip
    found = ask(offer("NVIDIA L4", 0.1, name="g6f.large", count=0.125), graph=small).answers[0]

    assert found.estimate.memory_limit == pytest.approx(0.94 * find("L4").device.memory_bytes / 8)
    assert any("a slice" in reason for reason in found.reasons)


def test_this_computer_serves_a_small_model():
    """Where it is quick enough and done within a day nothing is rented."""
    device = Device(
        name="cpu", peak_flops={"fp32": 1e12}, memory_bytes=64e9, memory_bandwidth=5e10, category="cpu", family="local"
    )
    here = Cluster(name="1xcpu", groups=(Group(device=device, count=1, usd_per_hour=0.0),), links=())
    found = ask(local=here, tokens=1e4)

    assert found.answers[0].accelerator == "this computer's CPU"
    assert serve_paragraph(found).startswith("Take this computer")
    assert ask(local=here, tokens=1e4, latency_ms=0.7).answers[0].accelerator != "this computer's CPU"
    assert ask(local=here, tokens=1e12).answers[0].accelerator != "this computer's CPU"


def test_a_plain_forward_counts_samples():
    """--output-tokens 0: no cache, samples, latency of a batch."""
    found = ask(ONE, output_tokens=0)

    assert found.work.unit == "samples"
    assert found.answers[0].estimate.memory.cache == 0


def test_every_figure_can_be_traced():
    """Each has a formula and inputs with sources, and products give the value."""
    found = ask(offer(count=1, name="one", usd=3.0, spot=1.0), grid_kg_per_kwh=0.4)
    told = {name: explain_serving(found, name) for name in SERVE_FIGURES}
    usd = {item["name"]: item["value"] for item in told["usd"]["inputs"]}
    cache = {item["name"]: item["value"] for item in told["cache"]["inputs"]}

    assert all(item["source"] for figure in told.values() for item in figure["inputs"])
    assert told["usd"]["value"] == pytest.approx(usd["hours"] * usd["usd_per_hour"])
    assert told["hours"]["value"] == pytest.approx(usd["amount"] / usd["rate"] / 3600)
    assert told["memory"]["value"] == pytest.approx(sum(i["value"] for i in told["memory"]["inputs"]))
    assert told["decode"]["value"] == pytest.approx(sum(i["value"] for i in told["decode"]["inputs"]))
    assert told["cache"]["value"] == pytest.approx(
        gib(cache["batch"] * cache["length"] * cache["cached_elements"] * cache["bytes"])
    )
    assert told["co2"]["value"] == pytest.approx(0.4 * told["energy"]["value"])
    with pytest.raises(RequestError, match="not a figure"):
        explain_serving(found, "dollars")


def test_warnings_say_what_the_dollars_are_for():
    """A full engine, unless a rate is stated."""
    assert any("always full" in line for line in serve_warnings(ask()))
    assert not any("always full" in line for line in serve_warnings(ask(throughput=10.0)))


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"latency_ms": 1e-3}, "no offer meets --latency-ms 0.001"),
        ({"first_token_ms": 1e-3}, "no offer meets --first-token-ms"),
        ({"budget": 1e-9}, "no offer meets --budget"),
        ({"latency_ms": 0.7, "budget": 0.05}, "clash: each can be met, not all"),
        ({"precision": "int4"}, "--precision 'int4' is not one of"),
        ({"throughput": -1.0}, "--throughput -1 must be above 0"),
        ({"batch": 8}, "--batch and --task serve clash"),
        ({"trainable": "lora"}, "--trainable lora and --task serve clash"),
        ({"require": ("confidential",)}, "no offer meets --require confidential"),
        ({"only": ("Inferentia1",)}, "no offer meets --only: AWS Inferentia1"),
        ({"only": ("eia",)}, "AWS Elastic Inference has been retired"),
    ],
)
def test_what_cannot_be_met_says_why_and_what_is_nearest(needs, says):
    """Status 2, the clash in the first line, the way out in the hint."""
    with pytest.raises(RequestError) as caught:
        ask(**needs)

    assert says in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_status == 2


def test_options_of_serving_are_refused_elsewhere():
    """Training has no latency."""
    with pytest.raises(RequestError, match="--latency-ms and --task train clash"):
        Needs(latency_ms=50.0)


def test_a_model_that_nothing_holds_says_so():
    """One L4 holds no 405 billion parameters."""
    with pytest.raises(RequestError, match=r"can hold the model's 4\d\d\.\d billion") as caught:
        ask(L4, graph=HUGE)

    assert "--precision" in caught.value.hint


def test_spot_prices_hold_the_restarts():
    """Ten minutes five times a day are a thirtieth of it, by hand; asked for or not; too many leave nothing."""
    seller = offer(count=1, name="one", usd=3.0, spot=1.0)
    for asked in (False, True):
        found = ask(seller, interruptions_per_day=5.0, spot=asked).answers[0]
        assert found.spot.hours == pytest.approx(found.hours / (1 - 50 / 1440))
        assert found.spot.usd == pytest.approx(found.spot.hours * 1.0)
    with pytest.raises(RequestError, match="no spot offer serves"):
        ask(seller, interruptions_per_day=1000.0, spot=True)


def test_llm_runtimes_do_not_serve_plain_forwards():
    """JetStream, vLLM and TensorRT-LLM take decoders; a plain forward on a TPU goes through PyTorch."""
    tpu, _ = choose_runtime(find("TPU-v5e"), decodes=False)
    gpu, _ = choose_runtime(find("H100-SXM"), decodes=False)
    state, _ = choose_runtime(find("H100-SXM"), decodes=True, attends=False)
    across, _ = choose_runtime(find("TPU-v5e"), decodes=True, crosses=True)

    assert tpu is not None
    assert tpu.runtime == "PyTorch"
    assert gpu is not None
    assert gpu.runtime == "tensorrt"
    assert not {"vllm", "tensorrt-llm"} & set(gpu.others)
    assert state is not None
    assert state.runtime == "PyTorch"
    assert across is not None
    assert across.runtime != "jetstream"


def test_a_smaller_batch_that_costs_the_same_is_taken():
    """Once the arithmetic is busy, more at once only wait longer: dollars within a hundredth, a shorter batch."""
    found = ask(ONE, output_tokens=0).answers[0]
    dollars = found.on_demand.usd

    assert found.estimate.plan.batch < found.estimate.largest_batch
    assert found.estimate.plan.batch < 1024
    assert dollars <= 1.01 * min(a.on_demand.usd for a in ask(ONE, output_tokens=0).front)


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"throughput": 1e12}, "no offer meets --throughput 1e+12"),
        ({"precision": "tf32"}, "no runtime is known to serve in tf32"),
        ({"any_plan": True}, "--any-plan and --task serve clash"),
        ({"only": ("hf:tflite",)}, "TensorFlow Lite has been retired"),
    ],
)
def test_what_no_fleet_gives_is_refused(needs, says):
    """A fleet larger than any that was built, a precision that is none of serving, a product under its new name."""
    with pytest.raises(RequestError) as caught:
        ask(**needs)

    assert says in caught.value.message
    assert caught.value.hint
