"""Record: rings seen from the host, events and calls as columns, traces on disk."""
