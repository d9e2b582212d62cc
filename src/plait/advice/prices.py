"""How old a price is."""

from __future__ import annotations

import datetime
import re

from plait.hardware.offers import Offer

__all__ = ["OLD", "age_days", "price_warning"]

OLD = 90  # days, after which a price is an estimate (issue 5)


def age_days(offer: Offer, today: datetime.date) -> int | None:
    """Days since the offer's price was read; None where its source carries no date."""
    dates = [datetime.date.fromisoformat(text) for text in re.findall(r"\d{4}-\d{2}-\d{2}", offer.as_of)]
    return (today - min(dates)).days if dates else None


def price_warning(offer: Offer, today: datetime.date) -> str:
    """What to say of the price's age; '' where it is fresh."""
    age = age_days(offer, today)
    if age is None:
        return f"the price has no date ({offer.as_of}): ask {offer.cloud} before you rely on it"
    return f"the price is {age} days old ({offer.as_of}): ask {offer.cloud} before you rely on it" if age > OLD else ""
