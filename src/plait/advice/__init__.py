"""Which accelerator, from whom, for how long and how much: catalogue, offers and search put together."""
