"""Programs that the tests trace: sources, and what builds them."""
