"""Every command but train."""
