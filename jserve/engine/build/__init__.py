"""From configs to a ready engine: platform, sizes, memory, assembly."""
