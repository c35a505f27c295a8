"""Float8 against bf16: GEMMs, single linears, whole models."""
