"""Real programs, traced whole: what they do is what they do without us, and the counts are those of others."""
