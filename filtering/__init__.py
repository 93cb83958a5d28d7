"""What data_filter.py uses: measuring a tile, manual edits of tiles.csv, the pictures to look at. Needs no torch."""
