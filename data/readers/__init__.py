"""Read dataset files into Examples; every record is validated."""
