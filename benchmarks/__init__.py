"""What tracing costs, measured: ``python -m benchmarks`` (``./dev bench``); one module per question."""
