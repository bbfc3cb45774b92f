"""The library behind the flows: pure values and functions. Side effects live in `rollout.clients`."""
