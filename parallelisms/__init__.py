"""How a model is spread over devices, recomputed and compiled: each technique once, for all models."""
