"""Models and schedules of other pruning libraries, which are imported only when they are used."""
