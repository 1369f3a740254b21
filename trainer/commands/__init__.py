"""The commands before and around training: doctor, demo, fetch."""
