"""Backends of the ops: `eager`, `cpu` (native), `triton` and `cuda`, and the schemas that they implement."""
