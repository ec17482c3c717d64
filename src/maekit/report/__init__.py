"""What a run looks like: curves (`plots`), picture grids (`grids`), one self-contained page (`page`)."""
