"""`merit evaluate`: losses, answers and benchmarks of several models side by side. `evaluate` orchestrates."""
