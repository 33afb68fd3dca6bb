"""What is worth fusing, and what came of it: models compared on one data set, by bits per byte."""
