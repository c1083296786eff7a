"""Which degrees, how many replicas, and where: DistServe's placement search."""
