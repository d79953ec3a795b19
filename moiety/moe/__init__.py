"""The layer: routers, balance, capacity, experts."""
