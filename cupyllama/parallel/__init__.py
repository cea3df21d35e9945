"""Which processor a process computes on."""
