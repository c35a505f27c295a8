"""The update: optimizers, learning-rate schedules, gradient clipping."""
