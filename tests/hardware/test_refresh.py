"""Newer tables: checked first, then in use whole, or not at all. gpuhunt's own code reads catalogues that are made here."""

from __future__ import annotations

import datetime
import functools
import gc
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from plait.cli.clusters import cluster_of
from plait.cli.main import run
from plait.errors import HardwareError, PlaitError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import age_warning, load_offers
from plait.hardware.refresh import ages, install, refresh
from plait.hardware.tables import DATA, table_path

# gpuhunt leaves the sockets of refused requests to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TODAY = datetime.date(2026, 11, 24)


def forget() -> None:
    load_offers.cache_clear()
    load_accelerators.cache_clear()


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where refreshed tables go: empty at first."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPUHUNT_CATALOG_DIR", raising=False)
    forget()
    yield tmp_path / "cache" / "plait" / "tables"
    forget()
    gc.collect()  # here, where the warning is let pass


def item(**changes):
    """One of gpuhunt's records: an instance that our table has."""
    gpuhunt = pytest.importorskip("gpuhunt")
    values = {
        "provider": "aws", "instance_name": "p5.48xlarge", "location": "us-east-1", "price": 50.0, "cpu": 192,
        "memory": 2048.0, "gpu_count": 8, "gpu_name": "H100", "gpu_memory": 80.0, "spot": False, "disk_size": None,
        "gpu_vendor": gpuhunt.AcceleratorVendor.NVIDIA, **changes,
    }  # fmt: skip
    return gpuhunt.CatalogItem(**values)


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Publishes records as gpuhunt's own catalogue of one cloud, on this machine; gpuhunt downloads and parses it."""
    storage = pytest.importorskip("gpuhunt._internal.storage")
    site = tmp_path / "site"

    def publish(*items, version: str = "20261120-7", text: str | None = None) -> None:
        folder = site / "aws" / version
        folder.mkdir(parents=True)
        (site / "aws" / "version").write_text(version)
        path = folder / "aws.csv"
        storage.dump(items, str(path))
        if text is not None:
            path.write_text(text)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(path, "aws.csv")
        (folder / "catalog.zip").write_bytes(packed.getvalue())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    site.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", f"http://127.0.0.1:{server.server_port}")
    yield publish
    server.shutdown()
    server.server_close()
    thread.join(10)


def offer(cloud: str, instance: str, region: str):
    (found,) = [o for o in load_offers() if (o.cloud, o.instance_type, o.region) == (cloud, instance, region)]
    return found


def test_prices_of_a_catalogue_replace_ours(catalogue, own: Path):
    """On-demand and spot of one instance together, with the catalogue's date; the rest stays with its own."""
    before = load_offers()
    kept = offer("gcp", "a2-highgpu-1g", "us-central1")
    catalogue(
        item(), item(spot=True, price=20.0), item(spot=True, price=21.0),
        item(instance_name="new.2x", gpu_name="L40S", gpu_memory=48.0, gpu_count=2, price=3.0, location="eu-west-9"),
        item(instance_name="who.knows", price=1.0), item(instance_name="cpu", gpu_count=0, gpu_name=None, price=1.0),
    )  # fmt: skip
    result = refresh(TODAY)
    new = offer("aws", "p5.48xlarge", "us-east-1")

    assert (new.usd_per_hour, new.spot_usd_per_hour, new.as_of) == (50.0, 20.0, "2026-11-20")
    assert new.accelerator == "NVIDIA H100 SXM5"
    assert new.source == "gpuhunt catalogue of aws, version 20261120-7"
    assert offer("aws", "new.2x", "eu-west-9").price() == 1.5
    assert offer("gcp", "a2-highgpu-1g", "us-central1") == kept
    assert len(load_offers()) >= len(before) + 1
    assert result["clouds"] == ["aws"]
    assert result["left_out"] == {"an accelerator that its name does not tell for certain": 1, "no accelerator": 1}
    assert [path.name for path in own.iterdir()] == ["offers.csv"]


def test_a_tenfold_jump_is_not_believed(catalogue):
    """One offer in many: the old price stays. Most of them: the catalogue is broken and nothing changes."""
    old = offer("aws", "p5.48xlarge", "us-east-1")
    others = [
        item(instance_name=o.instance_type, location=o.region, price=o.usd_per_hour)
        for o in load_offers() if o.cloud == "aws" and o.usd_per_hour and o.instance_type != "p5.48xlarge"
    ][:9]  # fmt: skip
    catalogue(item(price=0.5), *others)
    result = refresh(TODAY)

    assert offer("aws", "p5.48xlarge", "us-east-1") == old
    assert result["left_out"] == {"a price that jumped more than tenfold (the old one is kept)": 1}
    catalogue(item(price=0.5), *others[:1], version="20261121")
    with pytest.raises(PlaitError, match="1 of 2 prices are more than 10 times"):
        refresh(TODAY)


@pytest.mark.parametrize(
    "text",
    ["", "not,a,catalogue\n1,2,3\n", "instance_name,location,price\np5.48xlarge,us-east-1,free\n",
     "instance_name,location,price,cpu,memory,gpu_count,spot\np5.48xlarge,us-east-1,nan,1,1,8,False\n",
     "instance_name,location,price,cpu,memory,gpu_count,spot\np5.48xlarge,us-east-1,0,1,1,8,False\n"],
)  # fmt: skip
def test_a_broken_catalogue_is_kept_out(catalogue, own: Path, capsys, text: str):
    """Status 1, what is wrong, how old the present prices are; the old table stays."""
    catalogue(text=text)

    assert run(["hardware", "refresh"]) == 1
    err = capsys.readouterr().err
    assert "error: refresh: gpuhunt's catalogue has no offer that is understood" in err
    assert "the present prices are of 20" in err
    assert not own.exists()


def test_offline_says_so(own: Path, monkeypatch, capsys):
    """Status 1; nothing is changed and nothing is waited for."""
    pytest.importorskip("gpuhunt")
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", "http://127.0.0.1:9")

    assert run(["hardware", "refresh", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: refresh: no catalogue of prices could be read" in captured.err
    assert "try again with a network" in captured.err
    assert "Traceback" not in captured.err
    assert not own.exists()


def test_without_gpuhunt(monkeypatch, capsys):
    """Status 2 and the extra that brings it; --ages needs neither it nor a network."""
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)

    assert run(["hardware", "refresh"]) == 2
    assert "pip install 'plait[prices]'" in capsys.readouterr().err
    assert run(["hardware", "refresh", "--ages", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["offers"] > 900
    assert found["without_a_date"] > 0


def test_newer_tables_are_used():
    """A checked table is read from then on."""
    assert table_path("offers.csv") == DATA / "offers.csv"

    install(offers=DATA / "offers.csv")

    assert table_path("offers.csv") != DATA / "offers.csv"
    assert ages()["newest_price"] >= "2026"


def test_a_broken_table_changes_nothing(tmp_path: Path):
    """A table that does not load is not installed, nor is one that has nothing."""
    bad = tmp_path / "bad.csv"
    for text, words in (("a,b\n1,2\n", "is missing"), ((DATA / "offers.csv").read_text().splitlines()[0], "no offers")):
        bad.write_text(text + "\n", encoding="utf-8")
        with pytest.raises(HardwareError, match=words):
            install(offers=bad)
    assert table_path("offers.csv") == DATA / "offers.csv"


def test_parts_that_offers_need_cannot_be_dropped(tmp_path: Path, own: Path):
    """A table of accelerators without a part that is offered fits no more."""
    lines = (DATA / "accelerators.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    short = tmp_path / "short.csv"
    short.write_text("".join(line for line in lines if not line.startswith("NVIDIA T4G")), encoding="utf-8")

    with pytest.raises(HardwareError, match="'NVIDIA T4G' is not in the catalogue"):
        install(accelerators=short)
    assert not own.exists()


def test_a_table_that_broke_later_is_left_aside(own: Path, capsys):
    """Somebody edited it: the shipped one is used, and that is said."""
    install(offers=DATA / "offers.csv")
    (own / "offers.csv").write_text("cloud,instance_type\naws,x\n", encoding="utf-8")
    forget()

    assert len(load_offers()) > 900
    assert "it is left aside, the shipped table is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("as_of", "words"),
    [("2026-11-01", ""), ("2026-08-26", ""), ("2026-08-25", "91 days old"), ("2026-08-01 (spot 2026-11-01)", "115 days old"),
     ("catalogue v8", "no date"), ("2026-02-31", "no date"), ("", "no date")],
)  # fmt: skip
def test_old_prices_are_warned_of(as_of: str, words: str):
    """From 91 days on, and where nobody knows."""
    warning = age_warning(as_of, "aws", TODAY)

    assert words in warning
    assert bool(warning) == bool(words)


def test_plan_and_estimate_hear_of_old_prices(tmp_path: Path):
    """A cluster's notes say how old its price is, be it the table's or a file's own."""
    path = tmp_path / "lab.yaml"
    path.write_text(
        "name: lab\ngroups:\n  - {part: H100, count: 1, usd_per_hour: 2.5, price_as_of: 2020-01-01}\nlinks: []\n"
    )

    assert any("days old (2020-01-01)" in note for note in cluster_of(str(path)).notes)
