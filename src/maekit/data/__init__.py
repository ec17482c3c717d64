"""What the disk holds becomes batches: sources (bytes and labels by index), images, views, a loader."""
