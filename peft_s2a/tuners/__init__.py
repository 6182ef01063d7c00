"""The S2A tuner and its layers."""
