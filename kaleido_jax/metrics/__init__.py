"""Numbers that compare sets of pictures by their features."""
