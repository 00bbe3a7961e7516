"""A dry run: the config, the data and the memory of a training, told without reading any weights."""
