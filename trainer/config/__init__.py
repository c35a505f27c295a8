"""Configuration: dataclasses composed, loaded strictly, checked, shown. Torch-free."""
