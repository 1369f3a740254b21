"""What is done with a trained model: evaluate, predict, calibrate, export, track."""
