"""Models and schedules of other pruning libraries. Nothing here is imported unless asked for."""
