"""fentry."""
