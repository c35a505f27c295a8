"""What a run measures and where it writes it: step line, scalars, memory, throughput, summary."""
