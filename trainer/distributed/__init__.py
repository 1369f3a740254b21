"""Ranks that live and die together: process group, device, watchdog, signals, deadline."""
