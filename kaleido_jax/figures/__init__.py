"""`kaleido figures`: the paper's figures from this project's models, with the numbers beside them.

Each is a folder of a vector file (SVG), a PNG and a CSV.
"""
