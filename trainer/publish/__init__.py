"""Bring a trained model and its curves to where they are used: export, push, track."""
