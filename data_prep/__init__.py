"""From folders and archives of images to WebDataset shards with a manifest: `python -m data_prep --help`."""
