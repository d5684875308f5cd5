"""Joules: windows of a counter, power traces, meters, power models."""
