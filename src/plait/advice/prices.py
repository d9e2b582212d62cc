"""How old a price is."""

from __future__ import annotations

import datetime

from plait.hardware.offers import OLD, Offer, age_warning, days_old

__all__ = ["OLD", "age_days", "price_warning"]


def age_days(offer: Offer, today: datetime.date) -> int | None:
    """Days since the offer's price was read; None where its source carries no date."""
    return days_old(offer.as_of, today)


def price_warning(offer: Offer, today: datetime.date) -> str:
    """What to say of the price's age; '' where it is fresh."""
    return age_warning(offer.as_of, offer.cloud, today)
