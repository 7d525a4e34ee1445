"""Where a run's apps run: in this process, in Flower's simulation, or on a SuperLink that runs already."""
