"""Worlds with faults by a seed."""
