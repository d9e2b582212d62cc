from __future__ import annotations

import pytest

from plait.errors import HardwareError
from plait.hardware.catalogue import load_accelerators
from plait.hardware.offers import cheapest, load_offers
from plait.hardware.tables import DATA

TABLE = (DATA / "offers.csv").read_text(encoding="utf-8").splitlines()


def test_the_shipped_offers_are_sound():
    """Every offer names a part of the catalogue and has a date."""
    offers = load_offers()

    assert len(offers) > 900
    assert all(offer.accelerator in load_accelerators() and offer.as_of for offer in offers)


def test_the_cheapest_is_cheapest_for_one_device():
    """Instances of different sizes are compared by one accelerator."""
    best = cheapest("NVIDIA H100 SXM5")

    assert best is not None
    whole = [o for o in load_offers() if o.accelerator == best.accelerator and o.usd_per_hour and o.count >= 1]
    assert best.price() == min(o.usd_per_hour / o.count for o in whole)


def test_an_offer_without_price_is_refused():
    """A missing price is no free machine."""
    offer = next(o for o in load_offers() if o.usd_per_hour is None)
    with pytest.raises(HardwareError, match="has no on-demand price"):
        offer.price()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [(2, "Toaster", "'Toaster' is not in the catalogue"), (3, "0", "must be above 0"), (7, "cheap", "is not a number")],
)
def test_a_broken_offer_says_where(tmp_path, column, value, message):
    """A wrong cell is named with its line."""
    cells = TABLE[1].split(",")
    cells[column] = value
    path = tmp_path / "offers.csv"
    path.write_text("\n".join([TABLE[0], ",".join(cells)]) + "\n", encoding="utf-8")
    with pytest.raises(HardwareError, match=f"line 2.*{message}"):
        load_offers(path)


def test_a_part_nobody_sells_has_no_price():
    """Unpriced parts stay unpriced."""
    assert cheapest("Huawei Ascend 910B3") is None
