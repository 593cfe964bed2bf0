"""Which expert holds the slot: a pure scheduler, and the asyncio driver that acts for it."""
