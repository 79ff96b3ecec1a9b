"""The synthetic sample data set: drawn scenes with captions and the truth about them."""
